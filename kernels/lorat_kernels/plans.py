"""Which candidate computes `linear_logprob` on which GPU, and in which block sizes: a table, nothing measured at run time.

A fixed table and not autotuning, because a log-prob must not depend on how many rows share the call: policy and
reference run the same kernel in the same blocks, so that equal adapters give equal bits.

Shared memory, registers and spills of every entry are held by `tests/test_kernel_compile.py`. The candidate was chosen
by counting bytes (`docs/kernel.md`); **no entry has been timed on a GPU yet**.
"""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    """A tile of `logits_kernel`: `m` rows × `n` columns of the vocabulary, `k` of the hidden size at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Plan(NamedTuple):
    candidate: str  # "fused": Triton matmul + log-sum-exp; "cublas": cuBLAS with float32 output + a row kernel
    half: Blocks  # bf16 and fp16 operands: tensor cores
    full: Blocks  # an operand in float32: IEEE multiply-adds


PLANS = {
    (8, 0): Plan("fused", Blocks(128, 256, 64, 8, 3), Blocks(128, 128, 32, 8, 2)),  # A100
    (8, 6): Plan("fused", Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 32, 8, 2)),  # RTX 30, A10, A40
    (8, 9): Plan("fused", Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 32, 8, 2)),  # RTX 40, L4, L40
    (9, 0): Plan("fused", Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 32, 8, 2)),  # H100, H200
    (12, 0): Plan("fused", Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 32, 8, 2)),  # RTX 50
}
INTERPRETED = Plan("fused", Blocks(16, 32, 16, 1, 1), Blocks(16, 32, 16, 1, 1))  # TRITON_INTERPRET=1 on the CPU


def plan_for(capability: tuple[int, int]) -> Plan | None:
    """The entry of a CUDA compute capability, or of the next older one; None below 8.0, where torch computes.

    An unknown newer card of a major version takes that version's greatest entry; one of an unknown major version (10.x)
    the greatest below it.
    """
    older = [known for known in PLANS if known <= capability]
    return PLANS[max(older)] if older else None
