"""Host memory while a real checkpoint is loaded in 4-bit. `python -m benchmarks.step.loading save|load FOLDER [CASE]`.

`benchmarks.step.memory` runs both as processes of their own: one writes shards of random bf16 weights, the other loads them
with `lorat.model.base.load_base` and watches its own /proc/self/status. RssFile is what is mapped (libraries, and files of a
checkpoint while they are), which the kernel drops when memory is short; RssAnon is what has to be there.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.step import models

FIELDS = ("VmRSS", "RssAnon", "RssFile")


def status() -> dict[str, float]:
    """This process's resident memory in MB, in all and by kind."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[name].split()[0]) * 1024 / 1e6 for name in FIELDS}


class Watch:
    """Inside `with`: the greatest of each figure of `status`, read every few milliseconds by a thread."""

    def __enter__(self) -> Watch:
        self.most, self._stop = status(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.005):
            self.most = {k: max(v, self.most[k]) for k, v in status().items()}

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.most = {k: max(v, self.most[k]) for k, v in status().items()}


def save(shape: dict[str, Any], folder: str, shard: str) -> dict[str, Any]:
    """Write a checkpoint of `shape` in bf16, random values, in files of at most `shard`; never more than one in memory."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(models.configuration(shape), dtype=torch.bfloat16)
    empty, place = dict(model.named_parameters()), Path(folder)
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=shard)
    values = torch.randn(max(e.numel() for e in empty.values()), dtype=torch.bfloat16).mul_(0.02)
    place.mkdir(exist_ok=True)
    for name, members in plan.filename_to_tensors.items():
        filled = {m: values[: empty[m].numel()].view(empty[m].shape).clone() for m in members}
        save_file(filled, place / name, metadata={"format": "pt"})
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    if plan.is_sharded:
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    files = list(place.glob("*.safetensors"))
    return {"shards": len(files), "mb": sum(f.stat().st_size for f in files) / 1e6}


def load(folder: str, device: str, quantised_mb: float) -> dict[str, Any]:
    """Load it as lorat does; MB before, at the peak and after, and the peak's growth over the 4-bit size."""
    from lorat.model.base import load_base
    from lorat.settings.config import TrustRegionConfig

    config = TrustRegionConfig(
        output_dir=folder, model_name_or_path=folder, use_cpu=device == "cpu", bf16=False, dtype="bfloat16"
    )
    import bitsandbytes  # noqa: F401  # before memory is read for the first time

    gc.collect()
    before = status()
    with Watch() as watch:
        model = load_base(config.base())
    gc.collect()
    after = status()
    grown = {k: watch.most[k] - before[k] for k in FIELDS}
    return {
        "before_mb": before,
        "peak_mb": watch.most,
        "after_mb": after,
        "grown_mb": grown,
        "quantised_mb": quantised_mb,
        "over_quantised": {k: grown[k] / quantised_mb for k in FIELDS},
        "parameters": sum(p.numel() for p in model.parameters()),
    }


if __name__ == "__main__":
    what, place = sys.argv[1:3]
    case = json.load(sys.stdin)
    print(json.dumps(save(case["shape"], place, case["shard"]) if what == "save" else load(place, **case)))
