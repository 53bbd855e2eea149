"""Every kernel compiled for every architecture of the table, without a GPU: what a card must have to run it.

The ceilings are the table in docs/kernel.md, the greatest of several Triton versions;
`python tests/test_kernel_compile.py` prints it anew from the Triton that is installed.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton's wheels are for Linux")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from lorat_kernels import kernels, launch
from lorat_kernels.plans import PLANS, Blocks, Plan, plan_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DOC = Path(__file__).parents[2] / "docs" / "kernel.md"
# bytes of shared memory that one program may use: CUDA C++ Programming Guide, table of compute capabilities
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
ARCHITECTURES = [10 * major + minor for major, minor in PLANS]
POINTERS = dict(y_ptr="*i64", highest_ptr="*fp32", rest_ptr="*fp32", target_ptr="*fp32", logp_ptr="*fp32")
NUMBERS = {"softcap": "fp32", "scale": "fp32", "unit": "fp32"}
WORST = dict(BIAS=True, SOFTCAP=True)
LOGITS = {  # name: (operand dtype, constants)
    "logits, no gradient": ("bf16", dict(STORE=False)),
    "logits": ("bf16", dict(STORE=True)),
    "logits, worst": ("bf16", dict(STORE=True, PARTS=2, EVEN_D=False, **WORST)),
    "logits, fp16": ("fp16", dict(STORE=True)),
    "logits, float32, worst": ("fp32", dict(STORE=True, EVEN_D=False, UPCAST=True, **WORST)),
}
ROWS = {  # name: (kernel, constants, warps)
    "reduce": (kernels.reduce_kernel, dict(FACTOR=True, BLOCK_T=launch.BLOCK_T, BLOCK_R=launch.BLOCK_R), 4),
    "residual": (kernels.residual_kernel, dict(SOFTCAP=True, TILE=128, BLOCK=launch.BLOCK_V), 4),
    "row": (kernels.row_kernel, dict(GRAD=True, BLOCK=launch.BLOCK_ROW, **WORST), 8),
}


def compiled(kernel, dtype, constants, arch, warps, stages):
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = f"*{dtype}" if name in ("x_ptr", "w_ptr", "b_ptr", "exp_ptr", "r_ptr") else "*fp32"
        signature[name] = (POINTERS | NUMBERS).get(name, pointer if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr") or name.startswith("stride"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=warps, num_stages=stages))


def compile_for(name, arch):
    if name in ROWS:
        kernel, constants, warps = ROWS[name]
        return compiled(kernel, "bf16", constants, arch, warps, 1)
    dtype, constants = LOGITS[name]
    plan = PLANS[divmod(arch, 10)]
    blocks = plan.full if dtype == "fp32" else plan.half
    default = dict(PARTS=1, BIAS=False, SOFTCAP=False, UPCAST=False, EVEN_D=True, stride_xd=1, stride_wd=1)
    tile = dict(BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_K=blocks.k)
    return compiled(kernels.logits_kernel, dtype, default | tile | constants, arch, blocks.warps, blocks.stages)


def resources(binary):
    """Registers a thread and bytes of stack a thread (where spilled registers go), as the cubin states them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said).groups()
    return int(registers), int(stack) + int(local)


def measured(name, arch):
    binary = compile_for(name, arch)
    registers, spilled = resources(binary.asm["cubin"])
    return binary.metadata.shared, registers, spilled, binary.asm["ptx"]


def ceilings():
    row = re.compile(r"^\| sm_(\d+) \| ([^|]+?) \| (\d+) \| (\d+) \| (\d+) \|$", re.MULTILINE)
    return {(m[2], int(m[1])): tuple(int(x) for x in m.groups()[2:]) for m in row.finditer(DOC.read_text())}


CASES = [(name, arch) for arch in ARCHITECTURES for name in [*LOGITS, *ROWS]]


def test_the_table_is_whole():
    assert set(ceilings()) == set(CASES)
    assert all(shared <= SHARED[arch] for (_, arch), (shared, _, _) in ceilings().items())


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_fits_the_card(name, arch):
    shared, registers, spilled, ptx = measured(name, arch)
    most = ceilings()[name, arch]
    assert shared <= most[0] <= SHARED[arch], f"{shared} bytes of shared memory, the table says {most[0]}"
    assert registers <= most[1] and spilled <= most[2], (registers, spilled, most)
    threads = 32 * (ROWS[name][2] if name in ROWS else PLANS[divmod(arch, 10)].half.warps)
    assert registers * threads <= 65536
    if name in LOGITS:  # tensor cores for 16 bits, and never TF32
        tensor_cores = "wgmma" in ptx or "mma.sync" in ptx
        assert tensor_cores == (LOGITS[name][0] != "fp32") and "tf32" not in ptx


def test_every_card_finds_its_plan():
    assert plan_for((7, 5)) is None
    assert plan_for((8, 7)) == PLANS[8, 6] and plan_for((10, 0)) == PLANS[9, 0] and plan_for((12, 1)) == PLANS[12, 0]
    for plan in PLANS.values():
        assert isinstance(plan, Plan) and plan.candidate in ("fused", "cublas")
        for blocks in (plan.half, plan.full):
            assert isinstance(blocks, Blocks) and all(x & (x - 1) == 0 for x in blocks[:4])


if __name__ == "__main__":
    print(f"triton {triton.__version__}", file=sys.stderr)
    for case in CASES:
        print(f"| sm_{case[1]} | {case[0]} | {' | '.join(str(x) for x in measured(*case)[:3])} |", flush=True)
