"""The benchmarks of the kernel run, at toy sizes, and end in one JSON document that says where it comes from."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def document(module, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["command"].startswith(f"python -m {module}") and found["commit"] and found["device"]["name"]
    assert found["versions"]["torch"].startswith("2.")
    return found


def test_the_kernel_benchmark(tmp_path):
    out = tmp_path / "results" / "kernel.json"
    found = document("benchmarks.kernel.compare", "--repeats", "3", "--rows", "5", "--vocab", "101", "--out", str(out))
    assert json.loads(out.read_text()) == found
    by_name = {}
    for row in found["rows"]:
        assert "failed" not in row, row
        by_name.setdefault(row["implementation"], []).append(row)
    expected = ["lorat", "naive eager", "lorat, fused", "lorat, cublas", "torch.compile", "torch linear_cross_entropy"]
    assert list(by_name) == [*expected, "TRL chunked", "Liger", "Cut Cross Entropy"]
    for name in ("lorat", "naive eager", "torch.compile", "TRL chunked"):
        assert [row["mode"] for row in by_name[name]] == ["no-grad", "forward", "forward+backward"]
        for row in by_name[name]:
            assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"] and row["ms"]["n"] == 3
            assert row["tflops"] > 0 and row["over_floor"] > 0
    assert by_name["lorat"][0]["logp_error"] < 4e-6 < by_name["naive eager"][0]["logp_error"]
    assert by_name["lorat"][2]["gradient_error"] < 2**-8  # one rounding to bf16
    assert {"log-prob error, nats", "no-grad over a bare matmul"} <= {t["target"] for t in found["targets"]}


def test_the_noise_of_rounded_logits():
    sizes = ["--sequences", "2", "--length", "128", "--vocab", "1500", "--dim", "64", "--layers", "1"]
    noise = document("benchmarks.kernel.logit_noise", *sizes)["noise"]
    ours, rounded = (noise[f"{name}, bf16 hidden"] for name in ("float32 logits (ours)", "bf16-rounded logits"))
    assert ours["per_token_rms_nats"] < 1e-5 and 5e-3 < rounded["per_token_rms_nats"] < 0.1
    assert rounded["per_sequence_rms_nats"] > 3 * rounded["per_token_rms_nats"]
