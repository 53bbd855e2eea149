"""A model that would compute packs wrongly is found before the first step, and trained on separate rows instead."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from lorat.errors import ConfigError, DataError
from lorat.model import probe
from lorat.model.models import Models
from lorat.model.probe import why_not
from lorat.packs import attention
from lorat.packs.packing import share_prompts
from tests.helpers.architectures import SEPARATE, SHARED, adapted, make
from tests.helpers.worlds import make_pairs, trainer_for

CPU = torch.device("cpu")


def attention_of(policy):
    """The attention of every configuration in a model."""
    return [m.config._attn_implementation for m in policy.modules() if hasattr(m, "config")]


def ask(policy, longest=64, autocast=contextlib.nullcontext):
    """The probe's answer; whatever it is, the model's attention is what it was."""
    before = attention_of(policy)
    answer = why_not(Models(policy, autocast=autocast), CPU, longest)
    assert attention_of(policy) == before and "lorat" not in str(before)
    return answer


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_good_models_pass(name, bf16):
    policy = adapted(make(name, SHARED[name]))
    assert ask(policy, autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16)) is None
    assert not policy.training


@pytest.mark.parametrize("name", SEPARATE)
def test_others_are_found_and_said_why(name):
    settings, word = SEPARATE[name]
    reason = ask(adapted(make(name, settings)))
    assert reason and word in reason


def test_a_model_that_heeds_layouts_already_goes_on_to():
    policy = adapted(make("Llama", SHARED["Llama"]))
    assert attention.install(policy.get_base_model())
    assert why_not(Models(policy), CPU, 64) is None
    assert policy.get_base_model().config._attn_implementation == attention.NAMES["sdpa"]


def spoilt(change):
    """`share_prompts` whose layout or positions went wrong."""

    def spoil(groups):
        pack = share_prompts(groups)
        return change(pack)

    return spoil


def leak(pack):
    """The second completion's keys are the first one's instead of the prompt's, as far as they go."""
    gather = pack.layout.gather.clone()
    n = pack.layout.keys[0]
    gather[n] = pack.layout.queries[0] - 1
    return dataclasses.replace(pack, layout=dataclasses.replace(pack.layout, gather=gather))


def positions(pack):
    return dataclasses.replace(pack, position_ids=torch.arange(pack.input_ids.shape[1])[None])


@pytest.mark.parametrize(("change", "word"), [(leak, "reach another"), (positions, "order of completions")])
def test_a_leak_and_wrong_positions_are_found(monkeypatch, change, word):
    policy = adapted(make("Llama", SHARED["Llama"]))
    monkeypatch.setattr(probe, "share_prompts", spoilt(change))
    assert word in ask(policy)


def test_positions_that_are_wrong_for_all_alike_are_found(monkeypatch):
    """Every completion starts two positions late, whatever its order: only separate rows show it."""

    def late(pack):
        starts = torch.zeros_like(pack.position_ids)
        starts[0, 7:] = 2  # the first prompt of the probe has 7 tokens
        return dataclasses.replace(pack, position_ids=pack.position_ids + starts)

    policy = adapted(make("Llama", SHARED["Llama"]))
    monkeypatch.setattr(probe, "share_prompts", spoilt(late))
    assert "separate rows" in ask(policy)


def test_a_layer_without_the_layout_is_found(monkeypatch):
    policy = adapted(make("Llama", SHARED["Llama"]))
    assert ask(policy) is None
    layer = policy.get_base_model().model.layers[1].self_attn
    plain = layer.forward
    layer.forward = lambda *a, **k: plain(*a, **{n: v for n, v in k.items() if n != attention.KEYWORD})
    assert ask(policy) == "1 of its 2 layers were called with the layout"


def test_a_window_that_does_not_arrive_is_found_where_rows_are_longer(monkeypatch):
    policy = adapted(make("Mistral", SHARED["Mistral"], sliding_window=40))
    for layer in policy.get_base_model().model.layers:
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, plain=plain, **k: plain(*a, **k)
    original = attention.packed_attention

    def without(*args, sliding_window=None, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "packed_attention", without)
    assert "window of 40 tokens" in ask(policy, longest=41)
    assert ask(policy, longest=40) is None


def test_chunks_are_fine_up_to_their_length():
    chunked = type("C", (), {"attention_chunk_size": 32, "layer_types": ["chunked_attention", "full_attention"]})()
    assert probe._configuration(chunked, 32) is None
    assert "chunked_attention" in probe._configuration(chunked, 33)


# ---- in the trainer


def save(name, settings, folder):
    from tests.helpers.worlds import make_tokenizer

    tokenizer = make_tokenizer()
    make(name, settings, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_that_cannot_trains_on_rows_and_says_so(tmp_path):
    folder = save("StableLm", SEPARATE["StableLm"][0], tmp_path / "model")
    trainer = trainer_for(folder, tmp_path / "run", make_pairs(8), max_steps=1)
    assert not trainer.scorer.packer.shared and "lorat_packs" not in attention_of(trainer.model)
    assert any("one padded row" in line and "0 of its 2 layers" in line for line in trainer.opening_lines(1))
    trainer.train()
    with pytest.raises(ConfigError, match="prefix_sharing=True cannot work with StableLmForCausalLM: 0 of its 2"):
        trainer_for(folder, tmp_path / "again", make_pairs(8), prefix_sharing=True)


def test_prefix_sharing_is_the_default_and_can_be_switched_off(neox, tmp_path):
    assert trainer_for(neox, tmp_path / "a", make_pairs(4)).scorer.packer.shared
    trainer = trainer_for(neox, tmp_path / "b", make_pairs(4), prefix_sharing=False)
    assert not trainer.scorer.packer.shared and not trainer.separate


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("held_out", [True, False])
def test_examples_beyond_the_budget_are_named_at_the_start(neox, tmp_path, shared, held_out):
    short, long = make_pairs(4), make_pairs(6)
    for row in (2, 5):
        long[row]["chosen"] = long[row]["chosen"] * 3
        long[row]["rejected"] = long[row]["rejected"] * 2
    settings = dict(max_length=256, prefix_sharing=None if shared else False)
    fits = trainer_for(neox, tmp_path / "run", long, **settings)
    needs = []
    for e in fits.train_dataset:
        p, c, r = (len(e[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
        needs.append(p + c + r if shared else 2 * (p + max(c, r)))
    budget = max(n for i, n in enumerate(needs) if i not in (2, 5))
    assert budget < min(needs[2], needs[5])
    given = dict(eval_pairs=long) if held_out else {}
    with pytest.raises(DataError) as error:
        trainer_for(neox, tmp_path / "b", short if held_out else long, max_tokens_per_pack=budget, **given, **settings)
    said = str(error.value)
    assert said.startswith("eval: 2 of 6" if held_out else "train: 2 of 6") and "rows 2, 5" in said
    assert f"max_tokens_per_pack={budget}" in said and f"Set max_tokens_per_pack={max(needs)}" in said
