"""Small real models and tokenizers, made from configurations and saved to disk, for every test that needs one."""

from __future__ import annotations

import random
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

WORDS = [
    *"the a small big red dog cat bird runs sleeps sings in on park house tree and or quickly softly".split(),
    ".",
    "?",
    ":",
]
ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"  # real pairs and a real tokenizer, where they lie beside the project
PEFT_TARGETS = ["query_key_value", "dense"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def sentence(rng: random.Random, low: int = 1, high: int = 9) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def make_pairs(n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` pairs of random words, prompts and completions of 1 to 9 words, chosen never equal to rejected."""
    rng, out = random.Random(seed), []
    while len(out) < n:
        pair = {"prompt": sentence(rng), "chosen": " " + sentence(rng), "rejected": " " + sentence(rng)}
        if pair["chosen"] != pair["rejected"]:
            out.append(pair)
    return out


def bits_on_cpu() -> None:
    """Skip where bitsandbytes' optimisers want a GPU and there is none."""
    if not torch.cuda.is_available() and Version(version("bitsandbytes")) < Version("0.50"):
        pytest.skip("bitsandbytes before 0.50 has its optimisers on a GPU only")


def save_neox(folder: Path, seed: int = 0, hidden: int = 64, layers: int = 2) -> str:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # logits wide enough that a wrong one shows
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run_config(model: str, out: Path | str, **changes):
    """Settings of a short deterministic run on the CPU in float32, in 4-bit unless changed."""
    from lorat.settings.config import CHECKPOINTING, TrustRegionConfig

    values = dict(
        model_name_or_path=model,
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        num_train_epochs=1,
        max_length=64,
        lora_r=4,
        lora_alpha=8,
        sync="frozen",
        disable_tqdm=True,
        seed=7,
    )
    values.update(changes)
    values[CHECKPOINTING] = values.pop("activation_checkpointing")
    return TrustRegionConfig(**values)


def trainer_for(model, out, pairs, **settings):
    """A trainer on `pairs`; `eval_pairs` and `callbacks` beside the settings of `run_config`."""
    from datasets import Dataset

    from lorat.train.trainer import TrustRegionTrainer

    eval_pairs = settings.pop("eval_pairs", None)
    callbacks = settings.pop("callbacks", None)
    args = run_config(model, out, **settings)
    held_out = Dataset.from_list(eval_pairs) if eval_pairs else None
    return TrustRegionTrainer(None, args, Dataset.from_list(pairs), held_out, callbacks=callbacks)


def nudge(trainer, seed=5, scale=0.05) -> None:
    """Move the policy away from the reference, the same way each time."""
    from lorat.reference import adapter_parameters

    generator = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(trainer.model, "default").values():
        p.data += scale * torch.randn(p.shape, generator=generator).to(p.device)
