"""The command as a person types it: runs, messages, exit statuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from importlib import import_module

import pytest
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lorat.cli.main import COMMANDS, main, usage
from tests.helpers.worlds import ROOT, make_pairs


@pytest.fixture
def run(neox, tmp_path):
    """A YAML file of a short run; `run("--key", "value")` starts it and returns the exit status."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(p) + "\n" for p in make_pairs(24)))
    settings = dict(
        model_name_or_path=neox,
        dataset_name=str(data),
        output_dir=str(tmp_path / "out"),
        beta=0.3,
        sync="soft",
        sync_alpha=0.5,
        sync_every=2,
        use_cpu="true",
        max_length=64,
        learning_rate="5e-3",
        per_device_train_batch_size=8,
        num_train_epochs=2,
        logging_steps=1,
        save_steps=2,
        lora_r=4,
    )
    config = tmp_path / "run.yaml"
    config.write_text("".join(f"{k}: {v}\n" for k, v in settings.items()))

    def start(*arguments: str) -> int:
        return main(["train", "--config", str(config), *arguments])

    start.out, start.config, start.data = tmp_path / "out", config, data
    return start


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
@pytest.mark.parametrize("sync", ["frozen", "soft", "hard"])
def test_nine_runs_from_one_yaml(run, method, sync, capsys):
    assert run("--method", method, "--sync", sync) == 0
    said = capsys.readouterr()
    state = json.loads((run.out / "trainer_state.json").read_text())
    losses = [h["loss"] for h in state["log_history"] if "loss" in h]
    moves = [h["reference/updates"] for h in state["log_history"] if "loss" in h]
    steps = 12 if method == "kto" else 6  # KTO takes the 48 completions of 24 pairs one by one
    assert len(losses) == steps
    start = {"dpo": math.log(2), "ipo": (1 / 0.6) ** 2, "kto": 0.5}[method]
    assert losses[0] == pytest.approx(start, rel=1e-6)
    assert moves == [0 if sync == "frozen" else n // 2 for n in range(1, steps + 1)]
    hard = [n for n, loss in enumerate(losses) if loss == pytest.approx(start, rel=1e-6)]
    assert hard == (list(range(0, steps, 2)) if sync == "hard" else [0])
    what = {"frozen": "frozen at the start", "soft": "0.5 of the policy blended in", "hard": "a copy of the policy"}
    assert what[sync] in said.err
    assert "24 pairs read as" in said.out and str(run.out) in said.out
    assert f"step {steps}/{steps}" in said.err
    reference = load_file(run.out / f"checkpoint-{steps}" / "ref" / "adapter_model.safetensors")
    policy = load_file(run.out / "adapter_model.safetensors")
    assert reference.keys() == policy.keys()
    same = all((reference[k] == policy[k]).all() for k in policy)
    assert same == (sync == "hard")
    assert (run.out / "README.md").is_file() and not (run.out / "ref").exists()


def test_evaluation_and_a_held_out_split(run, capsys):
    arguments = ("--dataset_split", "train[:16]", "--eval_dataset_split", "train[16:]", "--save_reference")
    assert run(*arguments, "--eval_strategy", "epoch") == 0
    said = capsys.readouterr()
    assert "eval: 8 pairs read" in said.out and "Evaluation: " in said.out and "rewards/accuracies" in said.out
    assert json.loads((run.out / "eval_results.json").read_text())["eval_loss"] > 0
    assert (run.out / "ref" / "adapter_model.safetensors").is_file()


def test_trl_names_and_the_cost_of_a_typo(run, capsys):
    run.config.write_text(run.config.read_text().replace("sync: soft\nsync_alpha: 0.5\nsync_every: 2\n", ""))
    assert run("--sync_ref_model", "true", "--ref_model_sync_steps", "2", "--loss_type", "sigmoid") == 0
    assert "0.6 of the policy blended in every 2" in capsys.readouterr().err
    assert run("--bta", "0.1") == 2
    assert "beta" in capsys.readouterr().err


def test_what_cannot_work_is_said_in_one_message_before_anything_is_loaded(run, capsys):
    broken = ("--sync_alpha", "1.5", "--beta", "-1", "--sync_every", "0", "--model_name_or_path", "/no/such/model")
    assert run(*broken) == 2
    said = capsys.readouterr().err
    for words in ("sync_alpha=1.5", "beta=-1", "sync_every=0"):
        assert words in said
    assert "Traceback" not in said and not run.out.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a", "chosen": " b", "rejected": " c"}\n{"prompt": "a", "chos\n', ["line 2"]),
        ('{"question": "a", "choosen": " b", "rejected": " c"}\n', ["choosen", "chosen"]),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', ["equal", "0"]),
        ("", ["empty"]),
    ],
)
def test_bad_data_ends_with_a_message(run, content, words, capsys):
    run.data.write_text(content)
    assert run() == 2
    said = capsys.readouterr().err
    assert said.startswith("lorat: error:") and "Traceback" not in said
    for word in words:
        assert word in said


def test_a_folder_with_another_run_is_refused_before_the_model_is_loaded(run, capsys):
    assert run() == 0
    capsys.readouterr()
    assert run("--model_name_or_path", "/no/such/model") == 2
    assert "holds another run" in capsys.readouterr().err
    assert run("--resume_from_checkpoint", "true", "--beta", "0.7") == 2
    assert "beta: 0.3 then, 0.7 now" in capsys.readouterr().err
    assert run("--overwrite_output_dir") == 0


def test_a_signal_ends_with_its_status_and_says_how_to_go_on(run, capsys, monkeypatch):
    from lorat.train.callbacks import ReferenceCallback

    move = ReferenceCallback.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        move(self, args, state, control, **kwargs)

    monkeypatch.setattr(ReferenceCallback, "on_step_end", interrupted)
    assert run() == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert "Stopped by a signal at step 3" in said and "--resume_from_checkpoint true" in said
    assert (run.out / "checkpoint-3" / "manifest.json").is_file()
    assert not (run.out / "adapter_model.safetensors").exists()  # the result is not there before the run is over
    monkeypatch.undo()
    assert run("--resume_from_checkpoint", "true") == 0
    assert (run.out / "adapter_model.safetensors").is_file()


def test_out_of_gpu_memory_says_what_to_set(run, capsys, monkeypatch):
    import torch

    from lorat.train.scorer import Scorer

    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(Scorer, "score", full)
    assert run() == 1
    said = capsys.readouterr().err
    assert "max_tokens_per_pack=8192" in said and "Tried to allocate 2.00 GiB" in said and "Traceback" not in said


def test_the_card_says_the_lag(run):
    """alpha 0.3 every 4 steps: 4 * 0.7 / 0.3 + 3 / 2."""
    assert run("--sync_alpha", "0.3", "--sync_every", "4") == 0
    assert "alpha 0.3 every 4 steps, lag 10.8 steps, 1 update" in (run.out / "README.md").read_text()


def test_help_version_and_unknown_commands(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("lorat 0.")
    assert main(["--help"]) == 0 and "lorat train --config" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["trian"]) == 2 and "'trian' is not a command" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0 and "sync_every" in capsys.readouterr().out
    assert main(["train"]) == 2 and "output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "lorat/cli").glob("*.py")), ids=lambda p: p.stem)
def test_a_command_is_a_file_of_one_shape(path, capsys):
    """Every file of the folder but the door and what commands share: listed, and run by `add_arguments` and `run`."""
    if path.stem in ("__init__", "main", "options", "terminal"):
        return
    assert path.stem in COMMANDS and f"lorat {path.stem} " in usage()
    command = import_module(f"lorat.cli.{path.stem}")
    assert callable(command.add_arguments) and callable(command.run)
    assert main([path.stem, "--help"]) == 0 and "--help" in capsys.readouterr().out
    assert main([path.stem, "--no-such-option", "1"]) == 2
    said = capsys.readouterr().err
    assert "are required" in said or "no_such_option is not a setting" in said or "--no-such-option" in said
    assert "Traceback" not in said


def test_every_command_has_a_file():
    assert all((ROOT / "lorat" / "cli" / f"{name}.py").is_file() for name in COMMANDS)


def test_help_can_be_cut_off():
    command = f"{sys.executable} -m lorat train --help | head -1"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in ended.stderr and "BrokenPipe" not in ended.stderr


def test_real_pairs_and_the_real_tokenizer(real_hh, real_pythia_tokenizer, tmp_path, capsys):
    """Real Anthropic-HH pairs, the real Pythia tokenizer, a small GPT-NeoX of its vocabulary in 4-bit."""
    model = tmp_path / "model"
    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    GPTNeoXForCausalLM(config).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(real_pythia_tokenizer / name, model)
    arguments = [
        "--model_name_or_path",
        str(model),
        "--dataset_name",
        str(real_hh),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    arguments += ["--max_length", "128", "--max_steps", "3", "--per_device_train_batch_size", "4", "--sync", "hard"]
    arguments += ["--sync_every", "2", "--logging_steps", "1", "--use_cpu", "true", "--learning_rate", "1e-3"]
    assert main(["train", *arguments]) == 0
    assert "860 pairs read as Anthropic-HH dialogues" in capsys.readouterr().out
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [h["loss"] for h in history if "loss" in h]
    assert losses[0] == losses[2] == pytest.approx(math.log(2), rel=1e-7)
    assert losses[1] != losses[0]
    # an untrained model of V tokens gives each about ln V nats
    lengths = -history[0]["logps/chosen"] / math.log(50304)
    assert 5 < lengths < 128
