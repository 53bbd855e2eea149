"""The moving reference: move one adapter of a PEFT model toward another, in place.

This is what lorat is about, and it needs torch alone: any PEFT model with two adapters of the same
shape will do. `copy_` and `blend_` act on every tensor of an adapter at once (LoRA factors, DoRA
magnitudes, `modules_to_save`); the update rules say when. Blending mixes the LoRA factors, not their
products: exact at alpha 0 and 1, and off by `alpha*(1-alpha)*(B_p-B_r)(A_p-A_r)` in between, which is
second order in the lag between the two (Gorbatovski et al., arXiv 2404.09656, mix whole weights).

Cost: one fused pass over the adapters' tensors, no memory beyond them, nothing of the base is touched.
Left out: when a step ends (the caller knows) and any collective (equal inputs give equal results on
every rank).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

POLICY = "default"  # PEFT's name for the trained adapter
REFERENCE = "ref"  # TRL's name for the frozen one

_OTHER_CONTAINERS = ("modules_to_save", "trainable_tokens_delta")


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Every tensor of one adapter, keyed by its path with the adapter's name taken out.

    Two adapters of the same configuration have the same keys. Raises `ValueError`, listing the adapters
    there are, if `adapter` is not one of them.
    """
    found: dict[str, nn.Parameter] = {}
    names: set[str] = set()
    for path, container in model.named_modules():
        kind = path.rpartition(".")[2]
        if not isinstance(container, nn.ModuleDict | nn.ParameterDict):
            continue
        if not (kind.startswith("lora_") or kind in _OTHER_CONTAINERS):
            continue
        names.update(container.keys())
        if adapter not in container:
            continue
        entry = container[adapter]
        if isinstance(entry, nn.Module):
            found.update({f"{path}.{name}": p for name, p in entry.named_parameters()})
        else:
            found[path] = entry
    if not found:
        raise ValueError(
            f"adapter {adapter!r} is not in this model, which has {sorted(names) or 'no adapter at all'}; "
            "add it with model.add_adapter(name, config) or name one of those."
        )
    return found


def _scalings(model: nn.Module, adapter: str) -> dict[str, float]:
    """LoRA scale (alpha/r or alpha/sqrt(r)) of `adapter`, keyed by the path of the adapted layer."""
    return {
        path: float(layer.scaling[adapter])
        for path, layer in model.named_modules()
        if isinstance(getattr(layer, "scaling", None), dict) and adapter in layer.scaling
    }


def _layer_of(name: str) -> str:
    """Path of the adapted layer that a key of `adapter_parameters` belongs to."""
    parts = name.split(".")
    at = next(i for i, part in enumerate(parts) if part.startswith("lora_") or part in _OTHER_CONTAINERS)
    return ".".join(parts[:at])


def _is_b(name: str) -> bool:
    return ".lora_B" in name or ".lora_embedding_B" in name


def paired(model: nn.Module, source: str, target: str) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """`(name, source tensor, target tensor)` for every tensor; raises `ValueError` that lists what does not match."""
    a, b = adapter_parameters(model, source), adapter_parameters(model, target)
    wrong = [f"{name}: only in {source!r}" for name in a.keys() - b.keys()]
    wrong += [f"{name}: only in {target!r}" for name in b.keys() - a.keys()]
    wrong += [
        f"{name}: {tuple(a[name].shape)} in {source!r}, {tuple(b[name].shape)} in {target!r}"
        for name in a.keys() & b.keys()
        if a[name].shape != b[name].shape
    ]
    if wrong:
        shown = "\n  ".join(sorted(wrong)[:8]) + (f"\n  … and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise ValueError(
            f"adapters {source!r} and {target!r} do not match, so one cannot be moved toward the other:\n  {shown}\n"
            "Give both the same rank and the same target modules."
        )
    return [(name, a[name], b[name]) for name in a]


def _rescaled(model: nn.Module, source: str, target: str, names: list[str], tensors: list[Tensor]) -> list[Tensor]:
    """The source tensors as the target's scale reads them: B times scale(source)/scale(target), the rest as they are."""
    mine, theirs = _scalings(model, source), _scalings(model, target)
    if mine == theirs:
        return tensors
    out = []
    for name, tensor in zip(names, tensors, strict=True):
        layer = _layer_of(name)
        ratio = mine[layer] / theirs[layer] if _is_b(name) else 1.0
        out.append(tensor if ratio == 1.0 else tensor.float().mul(ratio))
    return out


@torch.no_grad()
def copy_(model: nn.Module, source: str = POLICY, target: str = REFERENCE) -> None:
    """Make adapter `target` compute what `source` computes (a hard update); `source` is left as it is.

    Bit for bit where both have the same LoRA scale; another alpha or rsLoRA is folded into B.
    Raises `ValueError` if the two do not pair up.
    """
    pairs = paired(model, source, target)
    names, src, dst = (list(column) for column in zip(*pairs, strict=True))
    torch._foreach_copy_([d.data for d in dst], _rescaled(model, source, target, names, [s.data for s in src]))


@torch.no_grad()
def blend_(model: nn.Module, alpha: float, source: str = POLICY, target: str = REFERENCE) -> None:
    """`target <- alpha * source + (1 - alpha) * target`, tensor by tensor (a soft update, eq. 3 of arXiv 2404.09656).

    Arithmetic is float32 (float64 for float64 adapters) whatever the adapters are stored in.
    Raises `ValueError` for alpha outside [0, 1] or adapters that do not pair up.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is outside [0, 1]; 0 leaves the target alone, 1 copies the source.")
    if alpha == 1:
        return copy_(model, source, target)
    pairs = paired(model, source, target)
    names, src, dst = (list(column) for column in zip(*pairs, strict=True))
    mixed = _rescaled(model, source, target, names, [s.data for s in src])
    targets = [d.data for d in dst]
    if all(t.dtype in (torch.float32, torch.float64) and t.dtype == m.dtype for t, m in zip(targets, mixed)):
        torch._foreach_lerp_(targets, mixed, float(alpha))
    else:
        for t, m in zip(targets, mixed, strict=True):
            t.copy_(torch.lerp(t.float(), m.float(), float(alpha)))


@torch.no_grad()
def snapshot(model: nn.Module, adapter: str = POLICY) -> dict[str, Tensor]:
    """Copies of an adapter's tensors in host memory, as `distance` takes them."""
    return {name: p.detach().to("cpu", copy=True) for name, p in adapter_parameters(model, adapter).items()}


@torch.no_grad()
def distance(model: nn.Module, first: str = POLICY, second: str | Mapping[str, Tensor] = REFERENCE) -> float:
    """Frobenius norm of the difference of two adapters' weight changes, over all adapted layers.

    `second` is an adapter or a `snapshot` of `first`. For a LoRA layer the change is `s*B@A`, compared
    through `dB@A_1 + B_2@dA` so that close adapters lose no digits; it is never materialised (float64
    Gram matrices of the factors). Full tensors (`modules_to_save`, DoRA magnitudes) add the norm of their
    own difference; for DoRA the direction is compared before it is normalised.
    """
    a = adapter_parameters(model, first)
    b = {name: y for name, _, y in paired(model, first, second)} if isinstance(second, str) else second
    scale_a = _scalings(model, first)
    scale_b = _scalings(model, second) if isinstance(second, str) else scale_a
    total = torch.zeros((), dtype=torch.float64, device=next(iter(a.values())).device)

    def wide(x: Tensor) -> Tensor:
        return x.detach().to(total.device, torch.float64).flatten(1) if x.dim() > 1 else x.detach().to(total)

    for name, x in a.items():
        if ".lora_A" in name or ".lora_embedding_A" in name:
            continue  # taken together with its B
        if not _is_b(name):
            total += (wide(x) - wide(b[name])).square().sum()
            continue
        name_a = name.replace(".lora_B", ".lora_A").replace(".lora_embedding_B", ".lora_embedding_A")
        layer = _layer_of(name)
        b1, b2 = scale_a[layer] * wide(x), scale_b[layer] * wide(b[name])
        a1, a2 = wide(a[name_a]), wide(b[name_a])
        db, da = b1 - b2, a1 - a2
        total += ((db.T @ db) * (a1 @ a1.T)).sum() + 2 * ((db.T @ b2) * (a1 @ da.T)).sum()
        total += ((b2.T @ b2) * (da @ da.T)).sum()
    return math.sqrt(max(total.item(), 0.0))


@dataclass
class UpdateRule:
    """When and how far the reference moves; `alpha` 0 never moves it. State: what has happened so far.

    `age` is the reference's mean age in optimiser steps: the policy `n` steps ago has weight
    `alpha*(1-alpha)^k` in it, so each step adds 1 and each update multiplies by `1 - alpha`.
    """

    alpha: float = 0.0
    every: int = 1
    updates: int = field(default=0, init=False)
    last_step: int = field(default=0, init=False)
    age: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]; 0 never moves the reference, 1 copies the policy.")
        if self.every < 1 or self.every != int(self.every):
            raise ValueError(f"every={self.every} is not a whole number of optimiser steps of at least 1.")

    @property
    def moves(self) -> bool:
        return self.alpha > 0

    @property
    def lag(self) -> float:
        """Mean age of the reference in the long run, in optimiser steps: `every*(1-a)/a + (every-1)/2`."""
        return self.every * (1 - self.alpha) / self.alpha + (self.every - 1) / 2 if self.moves else math.inf

    def planned_updates(self, steps: int) -> int:
        """How often a run of `steps` optimiser steps moves the reference."""
        return steps // self.every if self.moves else 0

    def after_step_(self, model: nn.Module, step: int, source: str = POLICY, target: str = REFERENCE) -> bool:
        """Call once after each optimiser step, counted from 1; moves the reference if due and says whether it did."""
        self.age += 1
        if not self.moves or step % self.every:
            return False
        blend_(model, self.alpha, source, target)
        self.updates, self.last_step, self.age = self.updates + 1, step, self.age * (1 - self.alpha)
        return True

    def state_dict(self) -> dict[str, float]:
        return {"updates": self.updates, "last_step": self.last_step, "age": self.age}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.updates, self.last_step = int(state["updates"]), int(state["last_step"])
        self.age = float(state["age"])


def Frozen() -> UpdateRule:
    """The reference never moves: plain DPO, IPO or KTO."""
    return UpdateRule(alpha=0.0)


def Soft(alpha: float, every: int = 1) -> UpdateRule:
    """Every `every` optimiser steps `ref <- alpha*policy + (1-alpha)*ref`. `Soft(1, n)` is `Hard(n)`."""
    return UpdateRule(alpha=alpha, every=every)


def Hard(every: int) -> UpdateRule:
    """Every `every` optimiser steps `ref <- policy`."""
    return UpdateRule(alpha=1.0, every=every)
