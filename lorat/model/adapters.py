"""Two adapters on one base: attach, switch, and load back verified.

The policy is PEFT's adapter `default`, the reference is `ref`. Both are float32 whatever the base computes
in: a slow blend in bf16 rounds to nothing. Files are safetensors only; a pickle is never opened. Loading is
verified tensor by tensor, since a silently half-loaded adapter trains a wrong model for hours.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import ModelError, first_line
from ..reference import POLICY, REFERENCE, adapter_parameters, copy_, paired
from .base import keep_trainable_on_cpu_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def attach(
    model: PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None = None,
    *,
    policy_adapter: str | None = None,
    ref_adapter: str | None = None,
    ref_rank: int | None = None,
    check_base: bool = True,
) -> PeftModel:
    """Put policy and reference on the base; the reference starts as an exact copy of the policy.

    `model`: a base model, or a `PeftModel` whose adapter `default` becomes the policy as it is.
    `policy_adapter`, `ref_adapter`: folders (or hub ids) of saved adapters to start from. `ref_rank`: of a reference
    made here, at least the policy's. Raises `ModelError` if targets match nothing or include the head, or if an
    adapter belongs to another base, to other targets, or is of too small a rank.
    """
    keep_trainable_on_cpu_(model)
    if isinstance(model, PeftModel):
        if POLICY not in model.peft_config:
            raise ModelError(f"the model's adapters are {sorted(model.peft_config)}, none is 'default', the policy.")
        if policy_adapter or (ref_adapter and REFERENCE in model.peft_config):
            raise ModelError(
                f"the model comes with adapters {sorted(model.peft_config)}, and policy_adapter={policy_adapter!r}, "
                f"ref_adapter={ref_adapter!r} name others; hand over the base model, or leave them out."
            )
        policy = model
    elif policy_adapter:
        folder = adapter_folder(policy_adapter)
        peft_config = _read_adapter_config(folder)
        _check_base(model, peft_config, policy_adapter, check_base)
        policy = _wrap(model, peft_config)
        load_adapter_(policy, folder, POLICY)
    else:
        policy = _wrap(model, peft_config if peft_config is not None else LoraConfig(target_modules="all-linear"))
    _check_head(policy)
    if REFERENCE not in policy.peft_config:
        if ref_adapter:
            folder = adapter_folder(ref_adapter)
            ref_config = _read_adapter_config(folder)
            _check_base(policy.get_base_model(), ref_config, ref_adapter, check_base)
            policy.add_adapter(REFERENCE, ref_config)
            _check_pairs(policy, f"ref_adapter={ref_adapter!r}")
            load_adapter_(policy, folder, REFERENCE)
        else:
            policy.add_adapter(REFERENCE, _at_rank(policy.peft_config[POLICY], ref_rank))
            copy_(policy, POLICY, REFERENCE)
    _check_pairs(policy, "the model's own adapter 'ref'")
    for adapter in (POLICY, REFERENCE):
        for p in adapter_parameters(policy, adapter).values():
            if p.dtype in (torch.bfloat16, torch.float16):
                p.data = p.data.float()
    train_policy_only_(policy)
    return policy


def _wrap(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    targets = getattr(peft_config, "target_modules", None) or ()
    saved = getattr(peft_config, "modules_to_save", None) or ()
    if head and not isinstance(targets, str) and any(head == t or head.endswith(f".{t}") for t in (*targets, *saved)):
        raise ModelError(
            f"lora_target_modules={sorted(targets)} includes {head!r}, the head. Log-probs are computed without "
            "materialising logits, which needs a head that stays as it is; leave it out, or set all-linear."
        )
    peft_config = copy.deepcopy(peft_config)
    peft_config.inference_mode = False
    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    try:
        return get_peft_model(model, peft_config, adapter_name=POLICY)
    except ValueError as error:
        if "incompatible with Mamba" in str(error):
            raise ModelError(
                f"lora_target_modules={targets if isinstance(targets, str) else sorted(targets)} cannot work with "
                f"{type(model).__name__}: PEFT adapts no out_proj and no conv1d of a model with Mamba layers. Name other "
                f"layers; its linear ones are called {', '.join(n for n in linear if n not in (head, 'out_proj'))}."
            ) from error
        if "not found in the base model" not in str(error) and "No modules were targeted" not in str(error):
            raise
        raise ModelError(
            f"lora_target_modules={sorted(targets)} matches nothing in {type(model).__name__}, so nothing would be "
            f"trained. Its linear layers are called: {', '.join(n for n in linear if n != head)}. Set some of those, "
            "or all-linear."
        ) from error


def _check_head(model: PeftModel) -> None:
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model.get_base_model()).__name__} has no output head: it is not a causal LM.")
    if any(p.requires_grad for p in head.parameters()) or not isinstance(head, nn.Linear) or head.weight.dim() != 2:
        raise ModelError("the head is adapted or trainable; log-probs need a frozen head. Leave it out of the adapter.")
    if head.weight.dtype == torch.uint8:
        raise ModelError("the head itself is quantised; exclude it (llm_int8_skip_modules) when quantising the model.")


def _check_base(model: Any, config: PeftConfig, given: str, check: bool) -> None:
    """Refuse an adapter whose recorded base is another model: it would load, fit, and compute nonsense."""
    theirs, ours = config.base_model_name_or_path, model.config._name_or_path
    same = not theirs or not ours or Path(theirs).name.lower() == Path(ours).name.lower()
    if theirs and ours and Path(theirs).exists() and Path(ours).exists():
        same = Path(theirs).samefile(ours)
    if check and not same:
        raise ModelError(
            f"adapter {given!r} was trained on {theirs!r}, the base here is {ours!r}. On another base its weights mean "
            "nothing. Set model_name_or_path to its base, or check_adapter_base: false if both hold the same weights."
        )


def _at_rank(config: Any, rank: int | None) -> Any:
    """A copy of an adapter's configuration, at another rank and the same scale."""
    config = copy.deepcopy(config)
    if rank is not None and rank != config.r:
        if config.rank_pattern or config.alpha_pattern or rank < config.r:
            raise ModelError(f"ref_rank={rank} cannot be had for a policy of rank {config.r} or of many; leave it out.")
        config.lora_alpha *= (rank / config.r) ** (0.5 if config.use_rslora else 1)
        config.r = rank
    return config


def _check_pairs(model: PeftModel, given: str) -> None:
    try:
        policy, reference = (getattr(model.peft_config[name], "r", 0) for name in (POLICY, REFERENCE))
        paired(model, POLICY, REFERENCE, any_rank=reference >= policy)
    except ValueError as error:
        raise ModelError(f"{given} cannot be the reference of this policy: {error}") from error


def _read_adapter_config(folder: Path) -> PeftConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise ModelError(
            f"{str(folder)!r} holds no readable {ADAPTER_CONFIG} ({first_line(error)}); name a folder that PEFT saved."
        ) from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{str(folder)!r} holds a {config.peft_type} adapter; policy and reference are LoRA adapters.")
    return config


def adapter_folder(name: str) -> Path:
    """A local folder with a safetensors adapter: `name` itself, or a hub repository fetched to the cache."""
    folder = Path(name)
    if not folder.is_dir() and not folder.is_absolute() and name.count("/") == 1:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
        except Exception as error:
            raise ModelError(f"adapter {name!r} is neither a folder nor a hub id ({first_line(error)}).") from error
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = " It holds adapter_model.bin, a pickle, which is never opened." if list(folder.glob("*.bin")) else ""
        raise ModelError(
            f"adapter {name!r} has no {ADAPTER_WEIGHTS}.{pickled} Name a folder that PEFT saved with safetensors."
        )
    return folder


@torch.no_grad()
def load_adapter_(model: PeftModel, folder: Path, adapter: str) -> None:
    """Read `folder`'s safetensors into `adapter` and check that every tensor arrived, bit for bit."""
    try:
        saved = load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{str(folder / ADAPTER_WEIGHTS)!r} cannot be read ({error}); it is damaged or missing."
        ) from error
    try:
        set_peft_model_state_dict(model, saved, adapter_name=adapter)
        held = adapter_state(model, adapter)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the adapter in {str(folder)!r} does not fit this model: {error}") from error
    wrong = sorted(held.keys() ^ saved.keys())
    wrong += [k for k in held.keys() & saved.keys() if not torch.equal(held[k].cpu(), saved[k].to(held[k].dtype))]
    if wrong:
        raise ModelError(
            f"the adapter in {str(folder)!r} did not load into {adapter!r}: {len(wrong)} of {len(held)} tensors are "
            f"missing, unexpected or different, e.g. {wrong[0]}. It was saved for another base, rank or targets."
        )


def adapter_state(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors, in their shapes and types, under the names that PEFT gives them on disk."""
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def train_policy_only_(model: PeftModel) -> None:
    """Activate the policy; gradients for its tensors and for no other, by name and not by the present flags."""
    model.set_adapter(POLICY)
    trained = {id(p) for p in adapter_parameters(model, POLICY).values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
