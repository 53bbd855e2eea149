"""The predicted peak against real models: exact bytes of what stays, measured bytes of what a pass keeps."""

from __future__ import annotations

import contextlib
import itertools
import json
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.step.models import SHAPES, configuration
from lorat.cli.main import main
from lorat.errors import ConfigError, ModelError
from lorat.model.adapters import attach
from lorat.model.base import load_base
from lorat.model.fused import fuse_, native
from lorat.model.models import Head, Models
from lorat.packs import attention
from lorat.packs.packing import share_prompts
from lorat.plan import dry_pass
from lorat.plan.advice import fit
from lorat.plan.blueprint import draw
from lorat.plan.card import bytes_of, card_of
from lorat.plan.dry_pass import DryPass, Ledger, LikeCuda
from lorat.plan.memory import CONTEXT, STEP, Planner
from lorat.plan.optimiser import optimiser_memory
from lorat.settings.config import CHECKPOINTING
from tests.helpers.architectures import SHARED, make
from tests.helpers.worlds import bits_on_cpu, run_config

MODELS = {"GPTNeoX": {}, "Llama": {}, "Qwen2": {"tie_word_embeddings": True}, "Qwen2Moe": {}, "Mixtral": {}, "GPT2": {}}
SETTINGS = {
    "double": dict(dtype="bfloat16"),
    "plain": dict(dtype="float32", bnb_4bit_use_double_quant=False, ref_rank=8),
    "8bit": dict(dtype="bfloat16", quantize_embeddings="8bit"),
    "4bit": dict(dtype="bfloat16", quantize_embeddings="4bit"),
    "16-bit": dict(dtype="bfloat16", load_in_4bit=False, lora_target_modules=["dense", "q_proj", "c_proj"]),
}
CASES = [(m, s) for m, s in itertools.product(MODELS, SETTINGS) if "bit" not in s or m in ("GPTNeoX", "Llama")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name))
            make(name, SHARED[name], hidden_size=128, **MODELS[name]).save_pretrained(made[name])
        return made[name]

    return folder


def drawn_of(config, model_config):
    """The model of `config` without values."""
    return draw(config.base(), config.adapter(), model_config, config.ref_rank)


def real_bytes(model):
    """Bytes of a real model's storages by what they are, found without the code under test."""
    base = model.get_base_model()
    table, head = base.get_input_embeddings(), base.get_output_embeddings()
    found, seen = Counter(), set()

    def count(what, t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[what] += storage.nbytes()

    count("embeddings", table.weight)
    for p in head.parameters():
        count("head", p)
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        state = getattr(p, "quant_state", None)
        if ".default." in name or ".ref." in name:
            count("policy" if ".default." in name else "reference", p)
        else:
            count("weights" if state is not None else "other", p)
        beside = [getattr(p, "SCB", None)]
        if state is not None:
            beside += [state.absmax, state.code, state.offset]
            beside += [state.state2.absmax, state.state2.code] if state.state2 else []
        for t in beside:
            if isinstance(t, torch.Tensor):
                count("state", t)
    return found


ITEMS = {
    "4-bit weights": "weights",
    "quantisation state": "state",
    "embeddings": "embeddings",
    "head": "head",
    "norms, biases, unquantised layers": "other",
    "policy adapter": "policy",
    "reference adapter": "reference",
}


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_bytes_that_stay_are_those_of_the_real_model(name, settings, saved, tmp_path):
    changes = {} if name == "Mixtral" else SETTINGS[settings]  # its experts have ranks of their own
    config = run_config(saved(name), tmp_path, **{"dtype": "float32"} | changes)
    real = attach(load_base(config.base()), config.adapter(), ref_rank=config.ref_rank)
    planner = Planner(config.workload(), real.config)
    predicted = {i.name: i.bytes for i in planner.static}
    found = real_bytes(real)
    assert {item: predicted[item] for item in ITEMS} == {item: found[what] for item, what in ITEMS.items()}
    trained = [p for p in real.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    assert predicted["gradients"] == sum(p.grad.untyped_storage().nbytes() for p in trained)
    drawn = drawn_of(config, real.config)
    assert fuse_(drawn) == fuse_(real) and native(drawn, torch.bfloat16) == native(real, torch.bfloat16)


@pytest.mark.parametrize(
    "optim",
    ["adamw_torch_fused", "adamw_torch", "sgd", "adagrad", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"],
)
def test_optimiser_state_is_that_of_the_real_one(optim, tmp_path):
    """bitsandbytes' states are made by its own `init_state`; paged ones are counted where a GPU would put them."""
    from transformers import Trainer

    if "bit" in optim:
        bits_on_cpu()
    config = run_config(None, tmp_path, optim=optim)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(4, 100), (16, 300), (300, 400), (7,)]]
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(config)
    optimiser = cls(parameters, **settings)
    for i, p in enumerate(parameters):
        p.grad = torch.zeros_like(p)
        if "bit" in optim:
            optimiser.init_state(optimiser.param_groups[0], p, 0, i)
    if "bit" not in optim:
        optimiser.step()
    gpu, host, seen = 0, 0, set()
    for p in parameters:
        for key, t in optimiser.state[p].items():
            if not isinstance(t, torch.Tensor) or t.untyped_storage().data_ptr() in seen:
                continue
            seen.add(t.untyped_storage().data_ptr())
            size = t.untyped_storage().nbytes()
            if "paged" in optim and key in ("state1", "state2") and p.numel() >= 100_000:
                host += size
            elif key != "step" or "fused" in optim:
                gpu += size
    found = optimiser_memory(optim, parameters)
    assert (found.gpu, found.host) == (gpu, host)
    numbers = sum(p.numel() for p in parameters)
    assert found.step == 0 if optim == "adamw_torch_fused" else found.step <= 2 * 4 * numbers + 4096
    assert (found.step > 3 * numbers) == (optim in ("adamw_torch", "adagrad"))  # foreach makes a copy of all


def real_step(config, folder, groups):
    """A real pass on the CPU: bytes that wait for the backward, and the ledger of real storages."""
    model = attach(load_base(config.base()), config.adapter())
    fuse_(model)
    attention.install(model.get_base_model())
    model.train()
    if config.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        model.enable_input_require_grads()
    head, pack = Head.of(model), share_prompts(groups)
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    waiting = {}

    def keep(t):
        if (at := t.untyped_storage().data_ptr()) not in there and at not in waiting:
            waiting[at] = (weakref.ref(t.untyped_storage()), t.untyped_storage().nbytes())
        return t

    ledger = Ledger()
    with ledger:
        ledger.own([*model.parameters(), *model.buffers(), pack.input_ids])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = Models(model, head)(pack)
        kept = sum(size for ref, size in waiting.values() if ref() is not None)
        out.logratios.sum().backward()
        del out
    return kept, ledger


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["GPTNeoX", "Llama", "Qwen2"])
def test_activations_that_are_kept_are_those_that_autograd_keeps(name, dtype, saved, tmp_path):
    """All layers' without checkpointing, of five layers of which two are run; attention is the CPU's on both sides."""
    folder = tmp_path / "five"
    make(name, SHARED[name], num_hidden_layers=5, **MODELS[name]).save_pretrained(folder)
    config = run_config(str(folder), tmp_path, dtype=dtype)
    lengths = [(40, [60, 30]), (25, [50, 70])]
    groups = [([1] * p, [[2] * c for c in cs]) for p, cs in lengths]
    kept, ledger = real_step(config, folder, groups)
    config.bf16 = dtype == "bfloat16"
    model = make(name, SHARED[name], num_hidden_layers=5, **MODELS[name])
    planner = Planner(config.workload(), model.config, flash=False)
    moment = planner.moment(lengths)
    assert planner.dry.times == [1, 3, 1]
    assert moment.forward == pytest.approx(kept, rel=0.03)
    peak = ledger.peak()[0]
    assert moment.total - moment.logprobs == pytest.approx(peak, rel=0.08)


def test_with_checkpointing_a_layer_keeps_its_input(tmp_path):
    config = run_config(None, tmp_path, activation_checkpointing=True)
    config.bf16 = True
    model = make("Llama", SHARED["Llama"], num_hidden_layers=7)
    groups = [(100, [200, 212])]
    on = Planner(config.workload(), model.config).moment(groups)
    config = run_config(None, tmp_path)
    config.bf16 = True
    off = Planner(config.workload(), model.config).moment(groups)
    inputs = 512 * 64 * 2  # tokens x hidden size, in bf16
    assert on.by_layer[0] == inputs
    assert 7 * inputs <= on.forward < 12 * inputs and off.forward > 40 * inputs


UNDER_AUTOCAST = {  # beside the bytes of a number of a layer's input, for a LayerNorm model and for an RMSNorm one
    "fp16": (dict(fp16=True), 2, 2),
    "a float32 base": (dict(dtype="float32"), 4, 4),
    "dropout": (dict(lora_dropout=0.1), 4, 2),  # PEFT's layers answer in what they were given: a LayerNorm's float32
    "DoRA": (dict(use_dora=True), 4, 2),
}


@pytest.mark.parametrize("case", UNDER_AUTOCAST)
@pytest.mark.parametrize("name", ["GPTNeoX", "GPT2", "Llama"])
def test_models_of_either_norm_are_planned_under_autocast(name, case, tmp_path):
    """Layers are recomputed with the types of the forward; a model without autocast has less to keep."""
    settings, *sizes = UNDER_AUTOCAST[case]
    fp16, settings = "fp16" in settings, {k: v for k, v in settings.items() if k != "fp16"}
    config = run_config(None, tmp_path, activation_checkpointing=True, **settings)
    config.fp16, config.bf16 = fp16, not fp16
    planner = Planner(config.workload(), make(name, SHARED[name], num_hidden_layers=3).config)
    moment = planner.moment([(100, [200, 212])])
    assert planner.dry.autocast
    assert moment.by_layer[0] == 512 * 64 * sizes[name == "Llama"]  # tokens x hidden size
    assert planner.at(512, [(100, [200, 212])]).notes == [
        "this model computes under autocast, whose float32 copies are predicted less exactly"
    ]


def test_what_is_widened_is_what_cudas_autocast_widens():
    """Its answers without a GPU: types of tensors without values that are said to lie on one."""
    f = nn.functional

    def types(device, mode):
        x, w = (torch.empty(*shape, device=device, dtype=torch.float16) for shape in ((2, 4), (4,)))
        results = {
            "layer_norm": lambda: f.layer_norm(x, (4,), w, w),
            "rms_norm": lambda: f.rms_norm(x, (4,), w),
            "group_norm": lambda: f.group_norm(x, 2),
            "**": lambda: x**3,
            "2**": lambda: 2**x,
            "pow": lambda: x.pow(2),
            "torch.pow": lambda: torch.pow(x, 3.0),
            "rsqrt": lambda: torch.rsqrt(x),
            "reciprocal": x.reciprocal,
            "exp": x.exp,
            "log": x.log,
            "norm": x.norm,
            "softplus": lambda: f.softplus(x),
            "softmax": lambda: f.softmax(x, dim=-1),
            "its own type": lambda: f.softmax(x, dim=-1, dtype=torch.float16),
            "log_softmax": lambda: x.log_softmax(-1),
            "logsumexp": lambda: x.logsumexp(-1),
            "sum": x.sum,
            "cumsum": lambda: x.cumsum(-1),
            "prod": lambda: torch.prod(x),
            "of whole numbers": lambda: x.bool().sum(),
            "mean": x.mean,
            "gelu": lambda: f.gelu(x),
            "silu": lambda: f.silu(x),
            "sigmoid": x.sigmoid,
            "tanh": x.tanh,
            "relu": lambda: f.relu(x),
            "add": lambda: x + x,
            "mul": lambda: x * w,
            "matmul": lambda: x.float() @ x.T.float(),
            "linear": lambda: f.linear(x.float(), x.float()),
        }
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, torch.float16)
        try:
            with mode:
                return {name: function().dtype for name, function in results.items()}
        finally:
            torch.set_autocast_enabled(device, False)

    with FakeTensorMode():
        assert types("cpu", LikeCuda()) == types("cuda", contextlib.nullcontext())


def test_offloaded_inputs_and_layers_without_checkpointing_are_counted(tmp_path):
    """Of seven layers: all inputs, one input on its way back, and every other layer in full."""

    def kept(**how):
        on = how != {"off": True}
        kwargs = {f"{CHECKPOINTING}_kwargs": how} if on else {}
        config = run_config(None, tmp_path, activation_checkpointing=on, **kwargs)
        config.bf16 = True
        dry = DryPass(config.workload(), drawn_of(config, model.config), None)
        return dry.moment([(100, [200, 212])]), dry.times

    model = make("Llama", SHARED["Llama"], num_hidden_layers=7)
    inputs = 512 * 64 * 2
    (on, _), (off, _), (some, times), (host, _) = map(
        lambda how: kept(**how), ({}, {"off": True}, {"every_n_layers": 2}, {"offload": True})
    )
    assert on.by_layer[0] == inputs and off.by_layer[1] > 5 * inputs
    assert times == [2, 3, 1, 1]  # run: 3, 4, 5 and 6; layers 0, 2, 4 and 6 are recomputed, 1, 3 and 5 are not
    assert some.forward - on.forward == 3 * (off.by_layer[1] - inputs)
    assert on.kept - host.kept == 6 * inputs and host.work == on.work


def test_layers_of_different_kinds_are_counted_each(tmp_path):
    config = run_config(None, tmp_path)
    config.bf16 = True
    settings = SHARED["DeepseekV3"] | {"first_k_dense_replace": 2}
    short, long = (make("DeepseekV3", settings, num_hidden_layers=n).config for n in (4, 9))
    pair = [(20, [30, 40])]
    a, b = (DryPass(config.workload(), drawn_of(config, c), None) for c in (short, long))
    assert a.times == [1, 1, 1, 1] and b.times == [1, 1, 6, 1]
    one, two = a.moment(pair), b.moment(pair)
    assert two.forward - one.forward == 5 * one.by_layer[2] and one.by_layer[2] != one.by_layer[0]


def test_the_kernel_is_counted_by_its_own_budget(monkeypatch):
    from lorat_kernels.plans import plan_for

    half = torch.bfloat16
    count = lambda rows, grad: dry_pass.workspace(rows, 4096, 50432, half, half, grad, plan_for((8, 9)))  # noqa: E731
    tiles = 50432 // 128
    assert count(100, True) == 100 * (8 * tiles + 2 * 50432) and count(100, False) == 100 * 8 * tiles
    assert count(8192, True) <= dry_pass.BUDGET
    monkeypatch.setattr(dry_pass, "BUDGET", 60_000_000)
    assert count(8192, True) == 512 * (8 * tiles + 2 * 50432)
    assert dry_pass.workspace(8192, 64, 1000, half, half, True, None) == 3 * 4 * 512 * 1000 + 4 * 8192 * 64


def test_pythia_6_9b_as_the_project_wants_it(tmp_path):
    config = run_config(None, tmp_path, lora_r=16, activation_checkpointing=True, max_length=1024)
    config.bf16 = True
    plan = Planner(config.workload(), configuration(SHAPES["pythia-6.9b"])).at(2048)
    size = {i.name: i.bytes for i in plan.items}
    numbers = 32 * 12 * 4096**2
    assert size["4-bit weights"] == numbers // 2
    layers = 32 * 4 * (16 * 4 + 4 + 256 * 4)  # code tables and mean of each of 4 weights a layer
    assert size["quantisation state"] == numbers // 64 + numbers // 64 // 256 * 4 + layers
    assert size["embeddings"] == size["head"] == 50432 * 4096 * 2
    rank = 16 * 4 * 32 * (16384 + 8192 + 20480 + 20480)
    assert size["policy adapter"] == size["gradients"] == rank
    assert size["optimiser state"] == 2 * rank + 4 * 256  # two states, and a count for each of 256 tensors
    assert size["activations kept (inputs of the layers)"] == pytest.approx(32 * 2048 * 4096 * 2, rel=0.02)
    assert size["dequantised weight"] == 4 * 4096**2 * 2
    assert plan.allocated < 6.0 * 2**30
    assert plan.total == sum(size.values()) > plan.allocated + CONTEXT


def small(tmp_path, **changes):
    config = run_config(None, tmp_path, per_device_train_batch_size=16, max_length=100, **changes)
    config.bf16 = True
    return config, make("Llama", SHARED["Llama"], num_hidden_layers=12).config


def test_the_largest_packs_that_fit(tmp_path):
    config, model = small(tmp_path)
    planner = Planner(config.workload(), model)
    limit = (planner.at(700).total + planner.at(1000).total) // 2
    plan = planner.largest(limit)
    assert plan.fits and 700 <= plan.tokens <= 1000
    assert planner.at(plan.tokens).total <= limit < planner.at(plan.tokens + STEP).total
    assert planner.largest(2**40).tokens == 16 * 199  # a batch of 16 pairs is no longer
    assert planner.largest(planner.at(199).total).tokens == 199  # the longest pair: 1 + 99 + 99
    assert planner.largest(planner.at(320).total, longest=320).tokens >= 320
    assert not planner.largest(planner.at(320).total - 1, longest=320).fits


def test_what_to_change_where_nothing_fits(tmp_path):
    config, model = small(tmp_path, lora_r=32)
    need = Planner(config.workload(), model).at(199).total
    plan = fit(config.workload(), model, need - 2 * 2**20)
    assert not plan.fits and plan.tokens == 199
    assert plan.advice[0].startswith(f"{CHECKPOINTING}: true") and "fits" in plan.advice[-1]


def test_the_command_says_what_fits_and_exits_so(tmp_path, capsys):
    _, model = small(tmp_path)
    model.save_pretrained(tmp_path / "model")
    given = ["plan", "--model_name_or_path", str(tmp_path / "model" / "config.json"), "--max_length", "100"]
    assert main([*given, "--gpu-memory", "600MiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["available"] == 600 * 2**20
    assert found["total"] == sum(i["bytes"] for i in found["items"]) <= found["available"]
    assert found["longest_example"] == 199 <= found["max_tokens_per_pack"]
    tight = ["--optim", "adamw_8bit", "--lora_r", "8", "--gpu-memory", "501MiB"]
    assert main([*given, *tight]) == 1
    text = capsys.readouterr().out
    assert "It does not fit" in text and "199 tokens" in text and "larger card" in text
    assert main([*given, "--gpu-memory", "16GiB", "--max_tokens_per_pack", "256"]) == 0
    text = capsys.readouterr().out
    assert "packs of 256 tokens" in text and "It fits." in text and "of 16.00 GiB" in text
    row = text.splitlines()[1]
    assert len(row) == 96 and row.endswith("·" * 80) and set(row) <= {*"WSEHNPRGOKLADBCFX·"}
    assert main([*given, "--gpu-memory", "12 horses"]) == 2
    assert "12GiB" in capsys.readouterr().err


def test_a_card_by_name(tmp_path, capsys):
    """Its memory, less what a process does not see; a T4 has no bf16 and no FlashAttention."""
    assert card_of("RTX 4090") == card_of("4090") == card_of("geforce rtx 4090")
    _, model = small(tmp_path)
    model.save_pretrained(tmp_path / "model")
    given = [
        "plan",
        "--model_name_or_path",
        str(tmp_path / "model" / "config.json"),
        "--max_tokens_per_pack",
        "256",
        "--json",
    ]

    def planned(*words):
        assert main([*given, *words]) == 0
        return json.loads(capsys.readouterr().out)

    found, old = planned("--gpu", "4090"), planned("--gpu", "T4")
    assert found["available"] == int(0.98 * 24564 * 2**20) and old["available"] < 15110 * 2**20
    item = {i["name"]: i["bytes"] for i in found["items"]}
    wide = {i["name"]: i["bytes"] for i in old["items"]}
    assert wide["head"] == 2 * item["head"]  # float32, as a run computes there
    assert planned("--gpu", "T4", "--gpu-memory", "1GiB")["available"] == 2**30
    assert main([*given, "--gpu", "9999"]) == 2
    assert "4090" in capsys.readouterr().err


def test_amounts_and_models_that_make_no_sense(tmp_path):
    assert bytes_of("12") == bytes_of("12GiB") == bytes_of("12g") == 12 * 2**30
    assert bytes_of("12GB") == 12 * 10**9 and bytes_of("512 MiB") == 2**29
    for wrong in ("", "0", "-3", "12TB", "much"):
        with pytest.raises(ConfigError, match="12GiB"):
            bytes_of(wrong)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert main(["plan", "--model_name_or_path", str(tmp_path)]) == 2
    with pytest.raises(ModelError, match="embeddings are the head's"):
        drawn_of(run_config(None, tmp_path, quantize_embeddings="8bit"), make("GPT2", SHARED["GPT2"]).config)
