"""The tensors of a PEFT adapter, and which of another adapter's they belong to.

A walk over the model finds an adapter's LoRA factors, biases, DoRA magnitudes and `modules_to_save` under names that
do not hold the adapter's own, and the scale each layer reads them with. Nothing is kept between calls, so adapters may
be added, deleted, cast or moved at any time; the walk takes about a millisecond for a thousand modules. torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .lowrank import Factors

POLICY = "default"  # PEFT's name for the trained adapter
REFERENCE = "ref"  # TRL's name for the frozen one

_OTHER_CONTAINERS = ("modules_to_save", "trainable_tokens_delta")
_PAIRS = ((".lora_A", ".lora_B"), (".lora_embedding_A", ".lora_embedding_B"))


@dataclass(frozen=True)
class Adapter:
    """One adapter: its tensors by name, the layer of each name, and each layer's scale and number of experts."""

    name: str
    tensors: Mapping[str, Tensor]
    layer: dict[str, str]
    scale: dict[str, float]  # alpha/r or alpha/sqrt(r)
    experts: dict[str, int]  # layers whose factors hold several products

    def reading(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """The same adapter with other tensors under its names, of its shapes: those of a snapshot, say."""
        return replace(self, tensors=tensors)

    def factors(self) -> dict[str, Factors]:
        """`B (out, r)`, `A (r, in)` and scale of every product `s*B@A`, as views that may be written to.

        Embeddings count as their transpose, convolutions flattened, each expert of a parameter apart. Raises
        `ValueError` for a grouped convolution, whose factors are not one product.
        """
        found = {}
        for name_a, a in self.tensors.items():
            kind = next(((x, y) for x, y in _PAIRS if x in name_a and not name_a.endswith(".bias")), None)
            if kind is None:
                continue
            b = self.tensors[name_a.replace(*kind)].detach()
            b, a = b.view(len(b), -1), a.detach().view(len(a), -1)
            layer = self.layer[name_a]
            if b.shape[1] != a.shape[0]:
                raise ValueError(
                    f"{layer}: factors {tuple(b.shape)} and {tuple(a.shape)} are not one product (a grouped "
                    'convolution), so they cannot be mixed as one; set space="factors", or leave the layer out.'
                )
            experts = self.experts.get(layer, 1)
            if experts == 1:
                found[name_a] = Factors(b, a, self.scale[layer])
                continue
            stacked_a, stacked_b = a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts)
            for i in range(experts):
                found[f"{name_a}[{i}]"] = Factors(stacked_b[:, :, i], stacked_a[i], self.scale[layer])
        return found

    def others(self) -> dict[str, Tensor]:
        """What is no LoRA factor, by name, in its own shape: biases, DoRA magnitudes, whole modules, token rows."""
        return {n: t.detach() for n, t in self.tensors.items() if not is_factor(n)}

    def scale_of(self, name: str) -> float:
        """What the layer multiplies this tensor with: its scale for B and for the bias of B, 1 for all others."""
        return self.scale[self.layer[name]] if is_b(name) else 1.0


def is_b(name: str) -> bool:
    """Whether the layer's scale multiplies this tensor: B, or the bias of B."""
    return any(part in name for _, part in _PAIRS)


def is_factor(name: str) -> bool:
    return not name.endswith(".bias") and any(part in name for pair in _PAIRS for part in pair)


def _containers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, nn.ModuleDict | nn.ParameterDict]]:
    """`(path of the layer, kind, layer, container keyed by adapter)`, in the order of `named_modules`."""
    stack: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[nn.Module] = set()  # a module that is used twice is moved once
    while stack:
        path, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        below = []
        for kind, child in module._modules.items():
            if child is None:
                continue
            if isinstance(child, nn.ModuleDict | nn.ParameterDict) and (
                kind.startswith("lora_") or kind in _OTHER_CONTAINERS
            ):
                yield path, kind, module, child
            elif child._modules:
                below.append((f"{path}.{kind}" if path else kind, child))
        stack.extend(reversed(below))


def find(model: nn.Module, adapter: str) -> Adapter:
    """One adapter of the model; raises `ValueError`, listing those there are, if there is none of that name."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, str] = {}
    scale: dict[str, float] = {}
    experts: dict[str, int] = {}
    names: set[str] = set()
    for path, kind, layer, container in _containers(model):
        names.update(container.keys())
        if adapter not in container:
            continue
        prefix = f"{path}.{kind}" if path else kind
        entry = container[adapter]
        if isinstance(entry, nn.Module):
            fresh = {f"{prefix}.{name}": p for name, p in entry.named_parameters()}
        else:
            fresh = {prefix: entry}
        tensors.update(fresh)
        layers.update(dict.fromkeys(fresh, path))
        scaling = getattr(layer, "scaling", None)
        if isinstance(scaling, dict) and adapter in scaling:
            scale[path] = float(scaling[adapter])
        if kind.startswith("lora_") and isinstance(several := getattr(layer, "num_experts", 1), int) and several > 1:
            experts[path] = several
    if not tensors:
        raise ValueError(
            f"adapter {adapter!r} is not in this model, which has {sorted(names) or 'no adapter at all'}; "
            "add it with model.add_adapter(name, config) or name one of those."
        )
    return Adapter(adapter, tensors, layers, scale, experts)


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Every tensor of one adapter, keyed by its path with the adapter's name taken out.

    Two adapters of the same targets have the same keys. Raises `ValueError`, listing the adapters there are, if
    `adapter` is not one of them.
    """
    return dict(find(model, adapter).tensors)  # type: ignore[arg-type]  # in a model they are parameters


@torch.no_grad()
def snapshot(model: nn.Module, adapter: str = POLICY) -> dict[str, Tensor]:
    """Copies of an adapter's tensors in host memory, by name, in their shapes and types, as `distance` takes them."""
    return {name: p.detach().to("cpu", copy=True) for name, p in adapter_parameters(model, adapter).items()}


def check_pairs(first: Adapter, second: Adapter, *, any_rank: bool) -> None:
    """Raise `ValueError`, listing what is wrong, unless both have the same tensors (up to rank, if `any_rank`)."""
    a, b = first.tensors, second.tensors

    def apart(name: str) -> bool:
        x, y = tuple(a[name].shape), tuple(b[name].shape)
        if not any_rank or not is_factor(name):
            return x != y
        rank_at = 1 if is_b(name) else 0
        return len(x) != len(y) or any(i != j for at, (i, j) in enumerate(zip(x, y)) if at != rank_at)

    wrong = [f"{name}: only in {first.name!r}" for name in a.keys() - b.keys()]
    wrong += [f"{name}: only in {second.name!r}" for name in b.keys() - a.keys()]
    wrong += [
        f"{name}: {tuple(a[name].shape)} in {first.name!r}, {tuple(b[name].shape)} in {second.name!r}"
        for name in a.keys() & b.keys()
        if apart(name)
    ]
    if wrong:
        shown = "\n  ".join(sorted(wrong)[:8]) + (f"\n  … and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        needed = "the same target modules" if any_rank else "the same rank and the same target modules"
        raise ValueError(
            f"adapters {first.name!r} and {second.name!r} do not match, so one cannot be moved toward the other:\n"
            f"  {shown}\nGive both {needed}."
        )


def paired(
    model: nn.Module, source: str, target: str, *, any_rank: bool = False
) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """`(name, source tensor, target tensor)` for every tensor; raises `ValueError` that lists what does not match.

    `any_rank` lets the LoRA ranks differ, which `copy_` (to a greater rank) and `blend_` can work with.
    """
    first, second = find(model, source), find(model, target)
    check_pairs(first, second, any_rank=any_rank)
    return [(name, x, second.tensors[name]) for name, x in first.tensors.items()]  # type: ignore[misc]


def aligned(source: Adapter, target: Adapter) -> tuple[list[Tensor], list[Tensor], list[float], list[Tensor]]:
    """`(source tensors, target tensors of equal shape, source scale / target scale, the rest of the target)`.

    Where the target's rank is greater, its leading components take the source's, the rest is for the caller to clear
    or fade. Raises `ValueError` if the two do not pair up or the target's rank is smaller.
    """
    check_pairs(source, target, any_rank=True)
    src, dst, ratio, rest = [], [], [], []
    wider = {source.layer[n] for n, t in source.tensors.items() if t.shape != target.tensors[n].shape}
    for name, tensor in source.tensors.items():
        if is_factor(name) and source.layer[name] in wider:
            continue
        src.append(tensor.detach())
        dst.append(target.tensors[name].detach())
        ratio.append(source.scale_of(name) / target.scale_of(name))
    if wider:
        theirs = target.factors()
        for key, mine in source.factors().items():
            name = key.partition("[")[0]
            if source.layer[name] not in wider:
                continue
            r, other = mine.a.shape[0], theirs[key]
            if other.a.shape[0] < r:
                raise ValueError(
                    f"{source.layer[name]}: rank {r} in {source.name!r}, {other.a.shape[0]} in {target.name!r}; the "
                    f"smaller cannot hold a copy. Give {target.name!r} at least that rank, or use "
                    'blend_(model, 1.0, space="product"), which keeps the best approximation and returns its error.'
                )
            src += [mine.b, mine.a]
            dst += [other.b[:, :r], other.a[:r]]
            rest += [other.b[:, r:], other.a[r:]]
            ratio += [mine.scale / other.scale, 1.0]
    return src, dst, ratio, rest
