"""A merged model on disk: written beside its place, read back by plain transformers, and only then put there.

Shards of 2 GB, the tokenizer, and what else lies beside the base (how it generates, how pictures are read). Whatever fails,
nothing is left behind.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from ..errors import CheckpointError, ModelError, first_line
from ..model import folding
from ..model.base import Base, reading_in_turn

SENTENCES = (
    "The river runs past the old mill and turns south below the bridge.",
    "Human: What should I pack for a week in the mountains?\n\nAssistant: Warm layers, a good map, and water.",
    "def area(radius):\n    return 3.14159 * radius ** 2",
)
SHARD = "2GB"
BESIDE = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, gone when the block ends, with the parents made for it unless `target` is there."""
    made = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    staged = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.merging-", dir=target.parent))
        yield staged
    except OSError as error:
        raise CheckpointError(f"{str(target)!r} cannot be written ({error}); set --out to another place.") from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def publish(staged: Path, target: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    staged.chmod(0o777 & ~mask)
    os.replace(staged, target)


def save(plain: Any, staged: Path, trained: Base, tokenizer: Any, kind: torch.dtype) -> None:
    """Write the model in shards, its tokenizer and what lies beside its base; raises `CheckpointError` for a full disk."""
    layers = folding.decoder_layers(plain)
    kept = folding.stays_float32(plain)
    folding.round_(folding.outside(plain, layers.values()), kind, kept)
    how: dict[str, Any] = dict(revision=trained.revision or "main", trust_remote_code=trained.trust_remote_code)
    stored, text = (
        AutoConfig.from_pretrained(str(trained.name), **how).get_text_config(),
        plain.config.get_text_config(),
    )
    for key, value in stored.to_dict().items():
        if key.endswith(("dropout", "pdrop")):  # training had set it to 0
            setattr(text, key, value)
    beside = {f: cached_file(str(trained.name), f, _raise_exceptions_for_missing_entries=False, **how) for f in BESIDE}
    if beside["generation_config.json"]:
        plain.generation_config = GenerationConfig()  # the base's own file is taken as it is
    size = sum({t.data_ptr(): t.numel() * t.element_size() for t in plain.state_dict().values()}.values())
    free = shutil.disk_usage(staged).free
    if free < size:
        raise CheckpointError(
            f"the merged model takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {str(staged.parent)!r}; free some "
            "space, or set --out to another disk."
        )
    try:
        plain.save_pretrained(str(staged), max_shard_size=SHARD)
        tokenizer.save_pretrained(str(staged))
        for name, path in beside.items():
            if path:
                shutil.copyfile(path, staged / name)
    except (OSError, RuntimeError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"the merged model could not be written ({first_line(error)}); is there space beside {str(staged.parent)!r}?"
        ) from error


def unsaved_buffers(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict()
    return ((n, b) for n, b in model.named_buffers() if n not in saved)


def read_back(
    staged: Path, trained: Base, tokenizer: Any, kind: torch.dtype, buffers: dict[str, Tensor]
) -> torch.nn.Module:
    """The saved folder by plain transformers; raises `ModelError` where it is not whole or its tokenizer another.

    `buffers`: tensors that no file holds, made from the configuration in the type a model is loaded in. They are compared
    with those of the merged model and then taken from it, so that the weights alone decide.
    """
    try:
        with reading_in_turn():
            read: Any = AutoModelForCausalLM.from_pretrained
            loaded, said = read(
                str(staged), output_loading_info=True, use_safetensors=True, trust_remote_code=trained.trust_remote_code
            )
        again = AutoTokenizer.from_pretrained(str(staged), trust_remote_code=trained.trust_remote_code)
    except (OSError, RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"the merged model cannot be read back by transformers ({first_line(error)}).") from error
    wrong = [f"{kind_} {sorted(map(str, said[kind_]))[0]}" for kind_ in said if kind_.endswith("_keys") and said[kind_]]
    if wrong:
        raise ModelError(f"the merged model, read back by transformers, is not whole: {'; '.join(wrong)}.")
    if loaded.dtype != kind:
        raise ModelError(f"the merged model was saved in {kind} and reads back in {loaded.dtype}.")
    if [again(s)["input_ids"] for s in SENTENCES] != [tokenizer(s)["input_ids"] for s in SENTENCES] or (
        again.chat_template != tokenizer.chat_template
    ):
        raise ModelError("the saved tokenizer, read back, gives other tokens or another chat template than the run's.")
    for name, made in unsaved_buffers(loaded):
        ours = buffers.get(name)
        if (
            ours is None
            or ours.shape != made.shape
            or not torch.allclose(ours.double(), made.double(), rtol=1e-2, atol=1e-6)
        ):
            raise ModelError(f"the merged model, read back, computes another {name} from its configuration.")
        made.data = ours.data
    return loaded
