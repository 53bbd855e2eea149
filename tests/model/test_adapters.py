"""One base and two adapters: what they start from, what is refused, what survives a round trip."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorat.errors import ModelError
from lorat.model.adapters import attach, load_adapter_
from lorat.model.base import load_base, load_tokenizer
from lorat.model.models import Head, Models, check_head
from lorat.reference import adapter_parameters, distance
from tests.helpers.worlds import run_config, save_neox


def base(folder, tmp_path, **changes):
    return load_base(run_config(folder, tmp_path / "out", **changes).base())


def saved_adapter(folder: str, out: Path, seed: int = 0, **config) -> str:
    """A PEFT adapter with random weights, saved by PEFT alone."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value", "dense"], **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(task_type="CAUSAL_LM", **config))
    for p in adapter_parameters(model, "default").values():
        p.data = torch.randn(p.shape)
    model.save_pretrained(out)
    return str(out)


def tensors(model, adapter):
    return {k: p.detach().clone() for k, p in adapter_parameters(model, adapter).items()}


def on_disk(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


@pytest.mark.parametrize("arch", ["neox", "llama"])
def test_a_fresh_policy_and_reference_compute_the_base(request, arch, tmp_path):
    folder = request.getfixturevalue(arch)
    config = run_config(folder, tmp_path)
    plain = load_base(config.base())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        model = attach(plain, config.adapter())
        assert torch.equal(model(input_ids=ids).logits, expected)
        with Models(model).reference():
            assert model.active_adapter == "ref"
            assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.active_adapter == "default"
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model, "ref").values())


def test_starting_from_an_adapter_and_from_another_reference(neox, tmp_path):
    sft = saved_adapter(neox, tmp_path / "sft", seed=1)
    better = saved_adapter(neox, tmp_path / "better", seed=2)
    model = attach(base(neox, tmp_path), policy_adapter=sft)
    for adapter in ("default", "ref"):
        assert {k: v.tolist() for k, v in tensors(model, adapter).items()} == {
            k: v.tolist() for k, v in on_disk(sft).items()
        }
    assert distance(model) == 0
    model = attach(base(neox, tmp_path), policy_adapter=sft, ref_adapter=better)
    for adapter, folder in (("default", sft), ("ref", better)):
        for name, value in on_disk(folder).items():
            assert torch.equal(tensors(model, adapter)[name], value)
    assert [n for n, p in model.named_parameters() if p.requires_grad and ".default." not in n] == []


def test_a_16_bit_adapter_gets_float32_masters(neox, tmp_path):
    plain = base(neox, tmp_path, load_in_4bit=False, dtype="bfloat16")
    model = attach(plain, LoraConfig(r=2, target_modules=["dense"]))
    for adapter in ("default", "ref"):
        assert {p.dtype for p in adapter_parameters(model, adapter).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 2}, ["(2, 64)", "(4, 64)", "same rank"]),
        ({"target_modules": ["dense"]}, ["only in 'default'", "query_key_value"]),
    ],
)
def test_a_reference_of_another_shape_is_refused(neox, tmp_path, config, words):
    other = saved_adapter(neox, tmp_path / "other", **config)
    mine = LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value", "dense"])
    with pytest.raises(ModelError) as error:
        attach(base(neox, tmp_path), mine, ref_adapter=other)
    for word in [*words, other]:
        assert word in str(error.value)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_wider_reference_starts_as_an_exact_copy(neox, tmp_path, rslora):
    """Rank 12 for 4, the same scale: ΔW bit for bit, zeros beyond; a wider adapter that is given is taken as it is."""
    mine = LoraConfig(r=4, lora_alpha=8, target_modules=["dense"], use_rslora=rslora)
    model = attach(base(neox, tmp_path), mine, ref_rank=12)
    policy, reference = (adapter_parameters(model, name) for name in ("default", "ref"))
    for name, p in policy.items():
        head, tail = (reference[name][:4], reference[name][4:]) if "lora_A" in name else (reference[name][:, :4], 0)
        assert torch.equal(head, p), name
        assert not torch.as_tensor(tail).any() and reference[name].shape != p.shape
    scales = {
        m.scaling["default"] / m.scaling["ref"] for m in model.modules() if isinstance(getattr(m, "scaling", 0), dict)
    }
    assert all(s == pytest.approx(1, rel=1e-12) for s in scales)
    with pytest.raises(ModelError, match="ref_rank=2 cannot"):
        attach(base(neox, tmp_path), mine, ref_rank=2)
    wide = saved_adapter(neox, tmp_path / "wide", r=8)
    given = attach(base(neox, tmp_path), LoraConfig(r=4, target_modules=["query_key_value", "dense"]), ref_adapter=wide)
    assert {p.shape[0] for n, p in adapter_parameters(given, "ref").items() if "lora_A" in n} == {8}


def test_an_adapter_for_another_base_is_refused_unless_asked(neox, tmp_path):
    stranger = save_neox(tmp_path / "stranger-base", seed=9)
    adapter = saved_adapter(stranger, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"was trained on .*stranger-base") as error:
        attach(base(neox, tmp_path), policy_adapter=adapter)
    assert "check_adapter_base: false" in str(error.value) and neox in str(error.value)
    attach(base(neox, tmp_path), policy_adapter=adapter, check_base=False)
    wider = save_neox(tmp_path / "wider", hidden=128)
    with pytest.raises(ModelError, match="does not fit this model"):
        attach(base(wider, tmp_path), policy_adapter=adapter, check_base=False)


def test_an_adapter_that_does_not_arrive_whole_is_found(neox, tmp_path):
    folder = Path(saved_adapter(neox, tmp_path / "sft"))
    weights = on_disk(folder)
    name = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != name}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="did not load") as error:
        attach(base(neox, tmp_path), policy_adapter=str(folder))
    assert name in str(error.value)


def test_targets_that_match_nothing_name_those_there_are(neox, tmp_path):
    with pytest.raises(ModelError, match="matches nothing in GPTNeoXForCausalLM") as error:
        attach(base(neox, tmp_path), LoraConfig(target_modules=["q_proj"]))
    for word in ("q_proj", "query_key_value", "dense_4h_to_h", "all-linear"):
        assert word in str(error.value)


@pytest.mark.parametrize(("arch", "head"), [("neox", "embed_out"), ("llama", "lm_head")])
@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_the_head_is_refused_as_a_target(request, tmp_path, arch, head, where):
    plain = base(request.getfixturevalue(arch), tmp_path)
    head = next(n for n, m in plain.named_modules() if m is plain.get_output_embeddings())
    config = LoraConfig(target_modules=["dense", "down_proj"]) if where == "modules_to_save" else LoraConfig()
    setattr(config, where, [head])
    with pytest.raises(ModelError, match="head") as error:
        attach(plain, config)
    assert "all-linear" in str(error.value)


def test_a_folder_without_weights_or_configuration(neox, tmp_path):
    folder = tmp_path / "empty"
    shutil.copytree(neox, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="could not be loaded.*safetensors only") as error:
        base(str(folder), tmp_path)
    assert str(folder) in str(error.value)
    with pytest.raises(ModelError, match="no readable model configuration"):
        base(str(tmp_path), tmp_path)
    with pytest.raises(ModelError, match="no tokenizer could be loaded.*tokenizer_name_or_path"):
        load_tokenizer(run_config(str(tmp_path), tmp_path / "out").base())


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["LORAT_BOMB"]),))


def test_no_pickle_is_opened(neox, tmp_path, monkeypatch):
    mark = tmp_path / "exploded"
    monkeypatch.setenv("LORAT_BOMB", str(mark))
    adapter = Path(saved_adapter(neox, tmp_path / "sft"))
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Bomb(), adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model.bin, a pickle, which is never opened"):
        attach(base(neox, tmp_path), policy_adapter=str(adapter))
    model = tmp_path / "pickled"
    shutil.copytree(neox, model)
    (model / "model.safetensors").unlink()
    torch.save(Bomb(), model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors only"):
        base(str(model), tmp_path)
    assert not mark.exists()


def test_code_that_comes_with_a_model_runs_only_when_asked(neox, tmp_path):
    folder, mark = tmp_path / "remote", tmp_path / "exploded"
    shutil.copytree(neox, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    config["model_type"] = "not-a-known-type"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass C: pass\nclass M: pass\n")
    with pytest.raises(ModelError):
        base(str(folder), tmp_path)
    assert not mark.exists()


def test_a_model_repacked_for_inference_is_refused(neox, tmp_path):
    """bitsandbytes repacks 4-bit weights on AVX512-BF16 CPUs at the first eval forward, for good and without gradients."""
    plain = base(neox, tmp_path)
    linear = next(m for m in plain.modules() if hasattr(m, "support_avx512bf16_for_cpu"))
    assert linear.support_avx512bf16_for_cpu is False
    linear.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="Load it anew"):
        attach(plain, LoraConfig(target_modules=["dense"]))


def test_dropout_of_the_base_is_off(neox, tmp_path):
    folder = tmp_path / "dropping"
    shutil.copytree(neox, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5, "hidden_dropout": 0.5}))
    plain = base(str(folder), tmp_path).train()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(plain(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_head_that_is_not_what_it_seems_is_found(neox, tmp_path):
    model = attach(base(neox, tmp_path), LoraConfig(target_modules=["dense"]))
    head = Head.of(model)
    check_head(Models(model, head), torch.device("cpu"))
    with pytest.raises(ModelError, match="silently wrong"):
        check_head(Models(model, Head(head.weight, head.bias, None, 1.1)), torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_wide_16_bit_logits_is_not_taken_for_another_head(neox, tmp_path, dtype):
    plain = base(neox, tmp_path, load_in_4bit=False, dtype=dtype)
    with torch.no_grad():
        plain.get_output_embeddings().weight.mul_(12)  # logits of about 50, where bf16 steps by 0.25
    model = attach(plain, LoraConfig(target_modules=["dense"]))
    head = Head.of(model)
    assert model(input_ids=torch.arange(3, 20)[None]).logits.abs().max() > 40
    check_head(Models(model, head), torch.device("cpu"))
    with pytest.raises(ModelError, match="silently wrong"):
        check_head(Models(model, Head(head.weight, head.bias, None, 1.2)), torch.device("cpu"))


def test_a_file_that_peft_wrote_comes_back_bit_for_bit(neox, tmp_path):
    sft = saved_adapter(neox, tmp_path / "sft")
    model = attach(base(neox, tmp_path), policy_adapter=sft)
    model.save_pretrained(tmp_path / "again", selected_adapters=["default", "ref"])
    other = attach(base(neox, tmp_path), LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value", "dense"]))
    load_adapter_(other, tmp_path / "again" / "ref", "ref")
    for name, value in on_disk(sft).items():
        assert torch.equal(tensors(other, "ref")[name], value)
        assert not torch.equal(tensors(other, "default")[name], value)


def test_mamba_layers_that_peft_does_not_adapt_are_named():
    from tests.helpers.architectures import SEPARATE, make

    with pytest.raises(
        ModelError, match="lora_target_modules=all-linear cannot work with FalconH1ForCausalLM"
    ) as error:
        attach(make("FalconH1", SEPARATE["FalconH1"][0]))
    assert "q_proj" in str(error.value) and "out_proj, " not in str(error.value).rpartition("called")[2]
