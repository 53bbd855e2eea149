"""`lorat train` arguments: files and command lines as people write them, and what the errors say."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

from lorat.errors import ConfigError
from lorat.settings import arguments, sources
from lorat.settings.aliases import ADVICE, ALIASES, CHECKPOINTING, LOSSES
from lorat.settings.arguments import help_text, parse_config, translate_trl, types
from lorat.settings.config import TrustRegionConfig
from lorat.settings.sources import coerce, describe
from lorat.settings.table import GROUPS, METHODS

BASE = "model_name_or_path: some/model\ndataset_name: pairs.jsonl\noutput_dir: out\nuse_cpu: true\n"


@pytest.fixture
def parse(tmp_path):
    """`parse(yaml lines after the required ones, *argv)` -> (config, notes); the file's first free line is 5."""

    def run(text: str = "", *argv: str, base: str = BASE):
        file = tmp_path / "run.yaml"
        file.write_text(base + text, encoding="utf-8")
        notes: list[str] = []
        return parse_config(["--config", str(file), *argv], notes.append), notes

    return run


@pytest.fixture
def refused(parse):
    """The same for what must fail: returns the message."""

    def run(text: str = "", *argv: str, base: str = BASE) -> str:
        with pytest.raises(ConfigError) as caught:
            parse(text, *argv, base=base)
        return str(caught.value)

    return run


# Values


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("learning_rate: 1e-5", "learning_rate", 1e-5),  # text to YAML 1.1
        ("learning_rate: '3e-6'", "learning_rate", 3e-6),
        ("learning_rate: 1E-6", "learning_rate", 1e-6),
        ("learning-rate: 0.5", "learning_rate", 0.5),
        ("beta: .25", "beta", 0.25),
        ("beta: 1", "beta", 1.0),
        ("robust: off", "robust", False),
        ("load_in_4bit: no", "load_in_4bit", False),
        ("load_in_4bit: Off", "load_in_4bit", False),
        ("save_reference: yes", "save_reference", True),
        ("save_reference: on", "save_reference", True),
        ("save_reference: 1", "save_reference", True),
        ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: 20_000", "max_steps", 20000),
        ("max_length: null", "max_length", None),
        ("max_length: ~", "max_length", None),
        ("max_length: None", "max_length", None),
        ("max_length:", "max_length", None),
        ("beta: null", "beta", 0.1),
        ("report_to: null", "report_to", []),
        ("report_to: none", "report_to", []),
        ("report_to: tensorboard", "report_to", ["tensorboard"]),
        ("report_to: [tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("model_revision: 0123", "model_revision", "0123"),  # octal to YAML 1.1
        ("model_revision: 1e5", "model_revision", "1e5"),
        ("run_name: 2024-13-45", "run_name", "2024-13-45"),  # an impossible date to YAML 1.1
        ("run_name: no", "run_name", "no"),
        ("eval_dataset_split: train[90%:]", "eval_dataset_split", "train[90%:]"),
        ("lora_target_modules: q_proj", "lora_target_modules", ["q_proj"]),
        ("lora_target_modules: q_proj, v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_target_modules: [q_proj, v_proj]", "lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_target_modules:\n  - a\n  - b", "lora_target_modules", ["a", "b"]),
        ("optim_target_modules: '.*(q|v){1,2}'", "optim_target_modules", ".*(q|v){1,2}"),
        ("lr_scheduler_kwargs: {min_lr: 1e-7}", "lr_scheduler_kwargs", {"min_lr": 1e-7}),
        ("lr_scheduler_kwargs:\n  min_lr: 1e-7\n  n: 2", "lr_scheduler_kwargs", {"min_lr": 1e-7, "n": 2}),
        ("lr_scheduler_kwargs: '{\"min_lr\": 1e-7}'", "lr_scheduler_kwargs", {"min_lr": 1e-7}),
        ("eval_strategy: no", "eval_strategy", "no"),  # false to YAML 1.1
        ("eval_strategy: off", "eval_strategy", "no"),
        ("save_strategy: epoch", "save_strategy", "epoch"),
        ("lr_scheduler_type: cosine", "lr_scheduler_type", "cosine"),
        ("resume_from_checkpoint: yes", "resume_from_checkpoint", True),
        ("resume_from_checkpoint: out/checkpoint-5", "resume_from_checkpoint", "out/checkpoint-5"),
        ("beta: 0.3  # a comment", "beta", 0.3),
        ("output_dirs: &x 1\nbeta: 2", None, None),
    ],
)
def test_value_in_the_file(parse, refused, written, key, value):
    if key is None:
        assert "did you mean output_dir?" in refused(written)
        return
    got = getattr(parse(written)[0], key)
    assert got == value and (value is None or isinstance(got, type(value)))


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--learning-rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning_rate=1e-5"], "learning_rate", 1e-5),
        (["--save_reference"], "save_reference", True),
        (["--save-reference", "--beta", "0.3"], "save_reference", True),
        (["--save_reference", "false"], "save_reference", False),
        (["--no_load_in_4bit"], "load_in_4bit", False),
        (["--no-load-in-4bit"], "load_in_4bit", False),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--beta", "0.1", "--beta", "0.2"], "beta", 0.2),
        (["--max_length", "null"], "max_length", None),
        (["--max_length=none"], "max_length", None),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora_target_modules", "q_proj,v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora_target_modules=[q_proj, v_proj]"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lr_scheduler_kwargs", '{"min_lr": 1e-7}'], "lr_scheduler_kwargs", {"min_lr": 1e-7}),
        (["--run_name=a=b"], "run_name", "a=b"),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "auto"], "resume_from_checkpoint", "auto"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) and x and str(x[0]).startswith("--") else "",
)
def test_value_on_the_command_line(parse, argv, key, value):
    got = getattr(parse("", *argv)[0], key)
    assert got == value and (value is None or isinstance(got, type(value)))


def test_the_command_line_wins(parse):
    config, _ = parse("beta: 0.1\nlearning_rate: 1e-5\nrobust: false\n", "--beta", "0.3", "--learning-rate=2e-5")
    assert (config.beta, config.learning_rate) == (0.3, 2e-5)
    assert parse("max_length: 99\n", "--max_length", "null")[0].max_length is None


def test_everything_on_the_command_line():
    argv = ["--model_name_or_path", "m", "--dataset_name=d", "--output_dir", "o", "--use_cpu", "--sync", "hard"]
    config = parse_config(argv)
    assert (config.model_name_or_path, config.dataset_name, config.output_dir, config.sync) == ("m", "d", "o", "hard")


def test_every_default_reads_back():
    """Each field's own default, written out, comes back as itself."""
    plain = TrustRegionConfig(output_dir="out", use_cpu=True)
    for name in types().keys() - ALIASES.keys() - {"loss_type", "sync_ref_model", "use_peft", "disable_dropout"}:
        value = getattr(plain, name)
        value = getattr(value, "value", value)
        if name == "include_num_input_tokens_seen":  # "no" is false, which transformers turns into "no"
            continue
        if value is None or isinstance(value, list | dict) or name == "accelerator_config":
            continue
        assert coerce(str(value), types()[name]) == value, name


# Errors: types


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("learning_rate: high", ["run.yaml:5: learning_rate: high is not a number."]),
        ("beta: [1, 2]", ["beta: [1, 2] is not a number"]),
        ("beta: .nan", ["beta: .nan is not a number"]),
        ("beta: inf", ["beta: inf is not a number"]),
        ("beta: ''", ["beta: '' is not a number"]),
        ("beta: {a: 1}", ["beta: a mapping is not a number"]),
        ("lora_r: 8.5", ["lora_r: 8.5 is not a whole number"]),
        ("lora_r: true", ["lora_r: true is not a whole number"]),
        ("sync_every: often", ["sync_every: often is not a whole number or null"]),
        ("robust: maybe", ["robust: maybe is not true or false"]),
        ("robust: 2", ["robust: 2 is not true or false"]),
        ("method: DPO", ["method: DPO is not one of: dpo, ipo, kto, apo_zero, hypo; did you mean dpo?"]),
        ("eval_strategy: step", ["eval_strategy: step is not one of: no, steps, epoch; did you mean steps?"]),
        ("optim: adamw_torch_fusd", ["optim: adamw_torch_fusd", "did you mean adamw_torch_fused?"]),
        ("lora_target_modules: {a: b}", ["lora_target_modules: a mapping is not a list"]),
        ("lora_target_modules: [[a], b]", ["lora_target_modules: a nested list is not a list"]),
        ("run_name: [a, b]", ["run_name: [a, b] is not text"]),
        ("output_dir2: x", ["did you mean output_dir?"]),
        ("lr_scheduler_kwargs: [1]", ["lr_scheduler_kwargs: [1] is not a mapping or text or null"]),
        ("ref_model_sync_steps: many", ["ref_model_sync_steps: many is not a whole number or null"]),
        ("parallelism_config: x", ["parallelism_config cannot be written in a file; remove it"]),
    ],
)
def test_wrong_type_in_the_file(refused, written, words):
    message = refused(written)
    assert "run.yaml:5: " in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--beta", "high"], ["command line: beta: high is not a number."]),
        (["--beta", "1", "2"], ["command line: beta: [1, 2] is not a number."]),
        (["--beta"], ["command line: --beta has no value; give it a number."]),
        (["--beta="], ["beta: '' is not a number"]),
        (["--syncc", "soft"], ["command line: syncc is not a setting", "did you mean sync?"]),
        (["-b", "1"], ["command line: '-b' belongs to no key", "'1' belongs to no key"]),
        (["other.yaml"], ["command line: 'other.yaml' belongs to no key; write --config other.yaml"]),
        (["--beta=1", "2"], ["'2' belongs to no key"]),
        (["--config", "again.yaml"], ["--config takes one file, once"]),
        (["--no_beta"], ["no_beta is not a setting"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_wrong_on_the_command_line(refused, argv, words):
    message = refused("", *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("key", sorted(types()))
def test_a_misspelt_key_finds_its_right_one(refused, key):
    wrong = key[:-2] + key[-1] + key[-2]
    if len(key) < 5 or key[-1].isdigit() or wrong in types() or wrong == key:
        pytest.skip("too short, or another key")
    line = next(line for line in refused(f"{wrong}: x").splitlines() if wrong in line)
    assert "run.yaml:5:" in line and f"did you mean {key}?" in line


@pytest.mark.parametrize("key", sorted(ADVICE))
def test_names_of_other_tools_get_advice(refused, key):
    message = refused(f"{key}: 1\n")
    assert f"{key} is not a setting of lorat: {ADVICE[key]}." in message
    assert key not in types()


def test_a_key_like_no_other(refused):
    assert "xyzzy is not a setting of lorat; `lorat train --help` lists the settings." in refused("xyzzy: 1")


def test_all_problems_in_one_message(refused):
    text = "learning_rate: high\nsyncc: soft\nrobust: maybe\nloss_type: hinge\nref_model_sync_steps: 8\n"
    message = refused(text, "--bta", "1", "--max_length", "long", base="use_cpu: true\n")
    lines = message.splitlines()
    assert lines[0] == "These settings cannot work:"
    for word in ["yaml:2: learning_rate", "yaml:3: syncc", "yaml:4: robust", "yaml:5: loss_type: hinge"]:
        assert sum(word in line for line in lines) == 1, (word, message)
    for word in ["yaml:6: ref_model_sync_steps: 8", "command line: bta", "command line: max_length: long"]:
        assert sum(word in line for line in lines) == 1, (word, message)
    for word in ["model_name_or_path is not given", "dataset_name is not given", "output_dir is not given"]:
        assert sum(word in line for line in lines) == 1, (word, message)
    assert len(lines) == 11


# Errors: files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("beta: 1\nbeta: 2\n", ["run.yaml:2:", "'beta' is given twice, in lines 1 and 2; keep one"]),
        ("beta: 1\nx: 1\nbeta: 1\n", ["run.yaml:3:", "lines 1 and 3"]),
        ("learning_rate: 1\nlearning-rate: 1\n", ["run.yaml:2:", "given twice"]),
        ("lr_scheduler_kwargs:\n  a: 1\n  a: 2\n", ["run.yaml:3:", "'a' is given twice"]),
        ("- beta\n- 1\n", ["run.yaml:1:", "holds a list", "key: value"]),
        ("just words\n", ["run.yaml:1:", "holds a single value", "key: value"]),
        ("beta: 1\n  x: 2\n", ["run.yaml:2:", "not valid YAML"]),
        ("a: 1\nbeta: [1,\n", ["run.yaml:", "not valid YAML"]),
        ("beta:\t1\n\tx: 1\n", ["run.yaml:1:", "not valid YAML"]),
        ("beta: 'open\n", ["run.yaml:", "not valid YAML"]),
        ("beta: !!python/object/apply:os.system [true]\n", ["run.yaml:1:", "not valid YAML"]),
        ("beta: 1\n---\nbeta: 2\n", ["run.yaml:2:", "not valid YAML"]),
        ("beta: *nothing\n", ["run.yaml:1:", "not valid YAML"]),
        ("? [a, b]\n: 1\n", ["run.yaml:1:", "not valid YAML"]),
        ("beta: \x00\n", ["run.yaml", "not valid YAML"]),
    ],
)
def test_a_file_that_is_no_flat_yaml(refused, text, words):
    message = refused(text, base="")
    assert all(word in message for word in words), message


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "train.yaml").write_text(BASE)
    with pytest.raises(ConfigError, match=r"there is no file .*run\.yaml \(in .*: train\.yaml\); give --config"):
        parse_config(["--config", str(tmp_path / "run.yaml")])
    with pytest.raises(ConfigError, match="there is no file"):
        parse_config(["--config", str(tmp_path / "no" / "run.yaml")])
    with pytest.raises(ConfigError, match="cannot be read as YAML text"):
        parse_config(["--config", str(tmp_path)])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00beta")
    with pytest.raises(ConfigError, match="cannot be read as YAML text"):
        parse_config(["--config", str(tmp_path / "binary.yaml")])


def test_an_empty_file_and_a_bare_config(refused):
    for text in ("", "# only a comment\n"):
        message = refused(text, base="")
        assert all(f"{key} is not given" in message for key in ("model_name_or_path", "dataset_name", "output_dir"))
    with pytest.raises(ConfigError, match="--config takes one file"):
        parse_config(["--config"])


def test_a_file_with_a_byte_order_mark_and_windows_lines(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + (BASE + "beta: 0.3\n").replace("\n", "\r\n").encode())
    assert parse_config(["--config", str(file)]).beta == 0.3


# Errors: what has to be given, and combinations


@pytest.mark.parametrize("key", ["model_name_or_path", "dataset_name", "output_dir"])
def test_what_has_to_be_given(refused, key):
    base = "".join(line for line in BASE.splitlines(True) if not line.startswith(key))
    for text in ("", f"{key}: null\n", f"{key}: ''\n"):
        message = refused(text, base=base)
        assert f"{key} is not given; set it to " in message and f"--{key}" in message
        assert len(message.splitlines()) == 2
    message = refused(f"{key}x: a\n", base=base)  # misspelt: said once
    assert f"did you mean {key}?" in message and "is not given" not in message
    message = refused(f"{key}: [a, b]\n", base=base)  # mistyped: said once
    assert "is not text" in message and "is not given" not in message


def test_contradictions_pass_through_and_join_what_is_missing(refused):
    message = refused("beta: 0\nlora_r: 0\n")
    assert message.startswith("This configuration cannot work:") and "beta=0.0" in message and "lora_r=0" in message
    message = refused("beta: 0\nlora_r: 0\neval_strategy: epoch\n", base="use_cpu: true\n")
    assert len(message.splitlines()) == 1 + 2 + 3 + 1
    assert "output_dir is not given" in message and "beta=0.0" in message and "eval_strategy: epoch" in message


@pytest.mark.parametrize("line", ["eval_strategy: steps", "eval_strategy: epoch", "eval_on_start: true"])
def test_evaluation_needs_data(parse, refused, line):
    message = refused(line)
    assert f"run.yaml:5: {line}, but no data" in message and "eval_dataset_split" in message
    assert parse(f"{line}\neval_dataset_split: test\n")[0].eval_dataset_split == "test"
    assert parse(f"{line}\neval_dataset_name: other.jsonl\n")[0].eval_dataset_name == "other.jsonl"


def test_data_to_evaluate_on_needs_no_strategy(parse):
    config, _ = parse("eval_dataset_split: test\neval_strategy: no\n")
    assert config.eval_strategy == "no" and config.eval_dataset_split == "test"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("load_best_model_at_end: true\n", ["transformers refuses", "load_best_model_at_end"]),
        ("warmup_steps: -1\n", ["transformers refuses", "warmup_steps"]),
        ("lr_scheduler_kwargs: '{bad: [}'\n", ["lr_scheduler_kwargs: {bad: [} is not a mapping"]),
        ("accelerator_config: {nonsense: 1}\n", ["transformers refuses", "nonsense"]),
    ],
)
def test_what_transformers_refuses(refused, text, words):
    message = refused(text)
    assert all(word in message for word in words), message


# TRL's names


@pytest.mark.parametrize(
    ("given", "expected", "note"),
    [
        ({"sync_ref_model": True}, {"sync": "soft", "sync_alpha": 0.6, "sync_every": 512}, "sync: soft"),
        (
            {"sync_ref_model": True, "ref_model_mixup_alpha": 0.9, "ref_model_sync_steps": 64},
            {"sync": "soft", "sync_alpha": 0.9, "sync_every": 64},
            "ref_model_sync_steps: 64 → sync_every: 64",
        ),
        ({"sync_ref_model": True, "sync_every": 8}, {"sync": "soft", "sync_alpha": 0.6, "sync_every": 8}, "0.6"),
        ({"sync_ref_model": False}, {"sync": "frozen"}, "sync_ref_model: false → sync: frozen"),
        ({"sync_ref_model": False, "ref_model_sync_steps": 9}, {"sync": "frozen"}, "ref_model_sync_steps: 9 → left"),
        ({"sync": "soft", "ref_model_sync_steps": 9}, {"sync": "soft", "sync_every": 9}, "sync_every: 9"),
        ({"loss_type": "sigmoid"}, {"method": "dpo"}, "loss_type: sigmoid → method: dpo"),
        ({"loss_type": ["sigmoid"]}, {"method": "dpo"}, "method: dpo"),
        ({"loss_type": "sigmoid_norm"}, {"method": "dpo", "length_normalize": True}, "length_normalize: true"),
        ({"loss_type": "ipo"}, {"method": "ipo"}, "method: ipo"),
        ({"loss_type": "robust"}, {"method": "dpo", "robust": True}, "robust: true"),
        ({"loss_type": "kto"}, {"method": "kto"}, "method: kto"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, {"method": "dpo", "label_smoothing": 0.1}, "TRL's sigmoid"),
        ({"dataset_config": "a"}, {"dataset_config_name": "a"}, "dataset_config: a → dataset_config_name: a"),
        ({"dataset_train_split": "a"}, {"dataset_split": "a"}, "dataset_split"),
        ({"dataset_test_split": "a"}, {"eval_dataset_split": "a"}, "eval_dataset_split"),
        ({"use_bnb_nested_quant": False}, {"bnb_4bit_use_double_quant": False}, "bnb_4bit_use_double_quant: false"),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}, "dtype: bfloat16"),
        ({"torch_dtype": "torch.float16"}, {"dtype": "float16"}, "dtype: float16"),
        ({"use_peft": True}, {}, "use_peft: true → left out"),
        ({"disable_dropout": True}, {}, "disable_dropout: true → left out"),
        ({"loss_type": None, "sync_ref_model": None}, {}, None),
        ({"beta": 0.1, "lora_r": 8}, {"beta": 0.1, "lora_r": 8}, None),
        ({"loss_type": "ipo", "method": "ipo"}, {"method": "ipo"}, "method: ipo"),
    ],
    ids=str,
)
def test_translation(given, expected, note):
    before = dict(given)
    out, notes = translate_trl(given)
    assert out == expected and given == before
    assert (notes == []) if note is None else any(note in n for n in notes), notes


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"loss_type": "hinge"}, ["loss_type: hinge", "sigmoid, sigmoid_norm, robust, ipo, kto"]),
        ({"loss_type": "apo_zero"}, ["loss_type: apo_zero", "sigmoid"]),
        ({"loss_type": ["sigmoid", "sft"]}, ["loss_type: [sigmoid, sft] mixes losses"]),
        ({"loss_type": []}, ["loss_type: []"]),
        ({"ref_model_mixup_alpha": 0.5}, ["ref_model_mixup_alpha: 0.5", "does nothing in TRL", "sync_ref_model: true"]),
        ({"ref_model_sync_steps": 5}, ["ref_model_sync_steps: 5", "sync_ref_model: true", "remove it"]),
        ({"use_peft": False}, ["use_peft: false", "adapters", "remove it"]),
        ({"disable_dropout": False}, ["disable_dropout: false", "lora_dropout"]),
        ({"loss_type": "ipo", "method": "dpo"}, ["loss_type: ipo", "method: dpo", "keep one"]),
        ({"sync_ref_model": True, "sync": "hard"}, ["sync_ref_model: true", "sync: hard", "keep one"]),
        ({"sync_ref_model": False, "sync": "soft"}, ["sync_ref_model: false", "sync: soft", "keep one"]),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, ["torch_dtype: float16", "dtype: bfloat16", "keep one"]),
        (
            {"sync_ref_model": True, "ref_model_sync_steps": 5, "sync_every": 6},
            ["ref_model_sync_steps: 5", "sync_every: 6", "keep one"],
        ),
        (
            {"gradient_checkpointing": True, "activation_checkpointing": False},
            ["gradient_checkpointing: true", "activation_checkpointing: false", "keep one"],
        ),
    ],
    ids=str,
)
def test_what_cannot_be_translated(given, words):
    with pytest.raises(ConfigError) as caught:
        translate_trl(given)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_a_whole_trl_file(parse):
    text = (
        "loss_type: [sigmoid]\nsync_ref_model: yes\nref_model_sync_steps: 1e2\ngradient_checkpointing: off\n"
        "gradient_checkpointing_kwargs: {use_reentrant: true}\ntorch_dtype: bfloat16\nuse_peft: true\n"
        "dataset_test_split: test\ndataset_train_split: train[:10]\nuse_bnb_nested_quant: no\n"
    )
    config, notes = parse(text)
    assert (config.method, config.sync, config.sync_alpha, config.sync_every) == ("dpo", "soft", 0.6, 100)
    assert not config.checkpointing and config.dtype == "bfloat16"
    assert getattr(config, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": True}
    assert (config.dataset_split, config.eval_dataset_split) == ("train[:10]", "test")
    assert config.bnb_4bit_use_double_quant is False
    assert "sync_ref_model: true → sync: soft" in notes and "use_peft: true → left out (always so)" in notes


def test_translation_errors_say_where(refused):
    assert "run.yaml:5: loss_type: hinge" in refused("loss_type: hinge\n")
    assert "command line: loss_type: hinge" in refused("", "--loss_type", "hinge")


@pytest.mark.parametrize(
    ("file", "argv", "expected"),
    [
        ("sync_ref_model: true", ["--sync", "frozen"], ("frozen", None, None)),
        ("sync_ref_model: true\nref_model_sync_steps: 9", ["--sync", "frozen"], ("frozen", None, None)),
        ("sync_ref_model: true\nref_model_sync_steps: 9", ["--sync", "soft"], ("soft", 0.6, 9)),
        ("sync_ref_model: true", ["--ref_model_sync_steps", "9"], ("soft", 0.6, 9)),
        ("sync_ref_model: true\nref_model_sync_steps: 9", ["--sync_every", "8"], ("soft", 0.6, 8)),
        ("sync_alpha: 0.5\nsync_every: 9", ["--sync", "hard"], ("hard", None, 9)),
        ("sync_alpha: 0.5\nsync_every: 9", ["--sync", "frozen"], ("frozen", None, None)),
        ("sync_alpha: 0.5\nsync_every: 9", ["--sync_ref_model", "no"], ("frozen", None, None)),
        ("sync_alpha: 0.5\nsync_every: 9", ["--sync_ref_model", "yes"], ("soft", 0.5, 9)),
        ("sync_alpha: 0.5\nsync_every: 9", ["--sync", "lag-100"], ("soft", 0.6, 86)),
        ("sync: adaptive\nsync_limit: 0.1\nsync_every: 9", ["--sync", "hard"], ("hard", None, 9)),
        ("sync_space: factors", ["--sync", "hard"], ("hard", None, 512)),
        ("sync: frozen", ["--sync_ref_model"], ("soft", 0.6, 512)),
    ],
)
def test_the_command_line_wins_under_either_name(parse, file, argv, expected):
    config = parse(file + "\n", *argv)[0].resolved()
    assert (config.sync, config.sync_alpha, config.sync_every) == expected


def test_what_the_command_line_makes_useless_is_noted(parse, refused):
    _, notes = parse("sync_alpha: 0.5\nsync_every: 9\n", "--sync", "frozen")
    assert len(notes) == 2 and "sync_alpha: 0.5" in notes[0] and "run.yaml:5" in notes[0] and "frozen" in notes[0]
    assert "sync=frozen holds still" in refused("sync: frozen\nsync_alpha: 0.5\n")  # within the file: an error
    assert "sync=frozen holds still" in refused("", "--sync", "frozen", "--sync_alpha", "0.5")


def test_method_and_checkpointing_override_under_either_name(parse):
    assert parse("loss_type: ipo\n", "--method", "kto")[0].method == "kto"
    assert parse("method: kto\n", "--loss_type", "ipo")[0].method == "ipo"
    assert not parse("gradient_checkpointing: true\n", "--activation_checkpointing", "false")[0].checkpointing
    assert not parse("activation_checkpointing: true\n", "--no_gradient_checkpointing")[0].checkpointing


def test_notes_go_to_stderr_once(tmp_path, capsys, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text(BASE + "sync_ref_model: true\n")
    parse_config(["--config", str(file)])
    out = capsys.readouterr()
    assert "lorat: sync_ref_model: true → sync: soft\n" in out.err and out.out == ""
    monkeypatch.setenv("RANK", "1")
    parse_config(["--config", str(file)])
    assert capsys.readouterr().err == ""


def test_names_and_defaults_are_trls():
    """TRL, where it is installed, has the names that are translated, with the defaults that are assumed."""
    trl = pytest.importorskip("trl")
    dpo = {f.name: f.default for f in fields(trl.DPOConfig)}
    script = {f.name for f in fields(trl.ScriptArguments)} | {f.name for f in fields(trl.ModelConfig)}
    for name in {"sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "loss_type", "disable_dropout"}:
        assert name in dpo, name
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # an alias where transformers lacks them
    for name in ALIASES.keys() - {"torch_dtype"} - newer | {"use_peft"}:
        assert name in dpo or name in script, name
    assert (dpo["ref_model_mixup_alpha"], dpo["ref_model_sync_steps"]) == (0.6, 512)


# Help


@pytest.mark.parametrize("width", [80, 120])
def test_help(width):
    text = help_text(width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width and "usage: lorat train --config run.yaml" in lines[0]
    assert [g for g in GROUPS if g in lines] == list(GROUPS)
    assert "\x1b" not in text
    for f in fields(TrustRegionConfig):
        if "group" not in f.metadata:
            continue
        row = next(line for line in lines if line.startswith(f"  {f.name} "))
        assert f.metadata["help"].split()[0] in row, f.name
        if f.type.startswith("Literal") and "|" not in f.type:
            for choice in ast.literal_eval(f.type.removeprefix("Literal")):
                assert choice in text
    flat = " ".join(text.split())
    assert "Rank of the adapters (usual: 8 to 64). [integer; 16]" in flat
    assert all(title in flat for title, _ in METHODS.values()) and f"[{', '.join(METHODS)}; dpo]" in flat
    assert (
        "Loss: DPO, IPO, KTO, APO-zero, or HyPO (DPO that ignores a pessimistic reference). [dpo, ipo, kto, apo_zero, hypo; dpo]"
        in flat
    )
    for name in types():
        if name in ("parallelism_config", "local_rank", "fsdp_config", "liger_kernel_config"):
            continue
        if name in ("do_train", "do_eval", "do_predict", "remove_unused_columns", "logging_nan_inf_filter"):
            continue
        if name in ALIASES:
            continue
        assert name in text, name
    assert all(loss in text for loss in LOSSES)


def test_help_examples_parse():
    """The example that gives everything on the command line does."""
    from lorat.settings.help import EXAMPLES

    argv = EXAMPLES.replace("\\\n", " ").splitlines()[-1].split()[2:]
    assert parse_config([*argv, "--use_cpu"]).output_dir == "out"


# The pieces


def test_words_for_types():
    assert describe(int) == "a whole number" and describe(float | None) == "a number or null"
    assert describe(types()["method"]) == "one of: dpo, ipo, kto, apo_zero, hypo"
    assert describe(types()["eval_strategy"]) == "one of: no, steps, epoch"
    assert all(describe(hint) for hint in types().values())


def test_sources_know_no_setting():
    source = inspect.getsource(sources)
    assert not any(f'"{name}"' in source for name in types())
    assert len(Path(arguments.__file__).read_text().splitlines()) <= 250
