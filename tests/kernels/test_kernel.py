"""The operator behind `linear_logprob`: the kernels under Triton's interpreter, torch.compile, checkpointing, choices."""

import os
import subprocess
import sys

import pytest
import torch
from lorat_kernels import launch, linear_logprob, plans
from lorat_kernels.linear_logprob import BUDGET

from tests.helpers.worlds import ROOT
from tests.kernels.test_linear_logprob import make, run, truth


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_kernel_triton.py runs in this process, on the GPU")
@pytest.mark.skipif(not launch.available(), reason="Triton's wheels are for Linux")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process that it would start")
def test_the_kernels_under_the_interpreter():
    """All of test_kernel_triton.py, in a process of its own: the interpreter is chosen when Triton is first imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-W", "ignore"]
    done = subprocess.run(
        [*command, "tests/kernels/test_kernel_triton.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed > 200, "tests of the kernels were lost"


def arguments(with_grad, dtype=torch.float32, **changes):
    hidden, weight, targets, bias = make(9, 8, 21, dtype)
    values = dict(temperature=0.8, softcap=5.0, ignore_index=-100, chunk_rows=4, budget=BUDGET)
    return (hidden, weight, targets, bias, with_grad, *(values | changes).values())


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_operator_keeps_the_rules_of_torch(with_grad, dtype):
    torch.library.opcheck(torch.ops.lorat.linear_logprob.default, arguments(with_grad, dtype))


def test_the_operator_keeps_the_rules_without_rows_bias_and_softcap():
    hidden, weight, targets, _ = make(0, 8, 21, torch.float32)
    values = (hidden, weight, targets, None, True, 1.0, None, -100, None, BUDGET)
    torch.library.opcheck(torch.ops.lorat.linear_logprob.default, values)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_without_a_graph_break(backend, dtype):
    torch._dynamo.reset()
    inputs, options = make(11, 16, 30, dtype), {"temperature": 0.9, "softcap": 5.0}
    expected = run(linear_logprob, *inputs, **options)
    compiled = torch.compile(linear_logprob, fullgraph=True, backend=backend, dynamic=True)
    logp, grad = run(compiled, *inputs, **options)
    assert torch.equal(logp, expected[0]) and torch.equal(grad, expected[1])
    with torch.no_grad():
        assert torch.equal(compiled(*inputs, **options), expected[0])
    other = make(17, 16, 30, dtype, seed=3)
    assert torch.equal(run(compiled, *other, **options)[1], run(linear_logprob, *other, **options)[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, monkeypatch):
    from torch.utils.checkpoint import checkpoint

    module, asked = sys.modules["lorat_kernels.linear_logprob"], []
    original = module._forward
    monkeypatch.setattr(module, "_forward", lambda *a: asked.append(a[4]) or original(*a))
    inputs = make(11, 16, 30, torch.bfloat16)
    expected = run(linear_logprob, *inputs)
    asked.clear()
    leaf = inputs[0].clone().requires_grad_()
    logp = checkpoint(lambda h: linear_logprob(h, *inputs[1:]), leaf, use_reentrant=reentrant)
    logp.sum().backward()
    assert torch.equal(logp.detach(), expected[0]) and torch.equal(leaf.grad, expected[1])
    assert asked == [not reentrant, True]  # the reentrant kind runs the first forward without gradient: 2NVD


def test_a_second_backward_through_the_graph_gives_the_same():
    hidden, *others = make(5, 8, 12, torch.float32)
    logp = linear_logprob(hidden.requires_grad_(), *others)
    first = torch.autograd.grad(logp.sum(), hidden, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(logp.sum(), hidden)[0], first)


def test_double_backward_is_refused():
    hidden, *others = make(5, 8, 12, torch.float32)
    (grad,) = torch.autograd.grad(linear_logprob(hidden.requires_grad_(), *others).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_a_head_under_an_adapter_is_refused():
    """Its weight alone would be the base's: the adapter would be left out silently."""
    peft = pytest.importorskip("peft")

    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 12)), peft.LoraConfig(target_modules=["0"]))
    hidden, _, targets, _ = make(5, 8, 12, torch.float32)
    with pytest.raises(ValueError, match="leave the head out of the adapter"):
        linear_logprob(hidden, model.base_model.model[0], targets)


def test_the_default_budget_holds_what_it_was_made_for():
    """8192 rows of a (151936, 4096) head with gradient: 512 rows a chunk, 295 MB counted out."""
    rows, dim, vocab, tile = 8192, 4096, 151936, 128
    chunk = launch.chunk_rows_of(rows, dim, vocab, 2, tile, True, BUDGET)
    held = 4 * rows * dim + chunk * (2 * vocab + 8 * -(-vocab // tile))
    assert chunk == 512 and held <= BUDGET
    assert launch.chunk_rows_of(rows, dim, vocab, 2, tile, True, 2 * BUDGET) == 1024
    assert launch.chunk_rows_of(rows, dim, vocab, 2, tile, True, 1) == 512  # never fewer
    assert launch.chunk_rows_of(100, dim, vocab, 2, tile, True, 1) == 100
    assert launch.chunk_rows_of(rows, dim, vocab, 2, tile, False, BUDGET) == launch.NO_GRAD_ROWS


def test_the_choice_depends_on_device_and_dtypes_alone(monkeypatch):
    monkeypatch.setattr(launch, "available", lambda: True)

    def choice(hidden, weight=torch.bfloat16, capability=(9, 0), device="cuda"):
        monkeypatch.setattr(launch, "plan_of", lambda _: plans.plan_for(capability))
        fake = [type("T", (), {"device": torch.device(device), "dtype": d})() for d in (hidden, weight)]
        return launch.candidate_of(*fake)

    monkeypatch.setitem(plans.PLANS, (9, 0), plans.PLANS[9, 0]._replace(candidate="cublas"))
    assert choice(torch.bfloat16) == "cublas" and choice(torch.bfloat16, capability=(8, 9)) == "fused"
    assert choice(torch.float32) == choice(torch.float32, torch.float32) == "fused"  # no TF32 by a global switch
    assert choice(torch.float64) == choice(torch.bfloat16, capability=(7, 5)) == "torch"
    assert choice(torch.bfloat16, device="cpu") == "torch"


def test_cpu_results_are_those_of_the_definition_at_any_budget():
    inputs = make(9, 8, 21, torch.float32)
    for budget in (1, BUDGET):
        logp = linear_logprob(*inputs, budget=budget)
        torch.testing.assert_close(logp.double(), truth(*inputs)[0], rtol=0, atol=4e-6)
    with pytest.raises(ValueError, match="budget=0"):
        linear_logprob(*inputs, budget=0)
