# make demo        set everything up and run a small alignment from scratch
# make test        set everything up and run the test suite (no GPU, no network beyond the package index)
# make lint        ruff and mypy
.PHONY: demo test lint clean
PYTHON ?=
VENV ?= .venv
export PYTHON VENV

demo:
	@scripts/setup-venv.sh
	@$(VENV)/bin/lorat demo

test:
	@scripts/setup-venv.sh test
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m "not whole"

# make test-whole  what make test leaves out: every architecture from training to the merged model, and a real model where
#                  LORAT_SMOLLM2 names the folder of SmolLM2-135M-Instruct
.PHONY: test-whole
test-whole:
	@scripts/setup-venv.sh test
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist load -m whole

lint:
	@scripts/setup-venv.sh dev
	@$(VENV)/bin/ruff check lorat kernels tests benchmarks examples
	@$(VENV)/bin/ruff format --check lorat kernels tests benchmarks examples
	@$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) demo-output build *.egg-info

# make bench       everything this machine can measure, into benchmarks/results/, and the tables made from it
.PHONY: bench
bench:
	@[ -n "$(GPU_PYTHON)" ] || scripts/setup-venv.sh test
	@PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH} $(or $(GPU_PYTHON),$(VENV)/bin/python) -m benchmarks.suite

# make test-gpu    the kernels' tests and whole runs on an NVIDIA GPU; GPU_PYTHON names an interpreter that has torch, pytest and
#                  transformers, where nothing is to be installed
.PHONY: test-gpu
GPU_PYTHON ?=
test-gpu:
	@[ -n "$(GPU_PYTHON)" ] || scripts/setup-venv.sh test
	@PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH} $(or $(GPU_PYTHON),$(VENV)/bin/python) -m pytest -q --durations=10 \
	  tests/kernels/test_linear_logprob.py tests/kernels/test_kernel.py tests/kernels/test_kernel_triton.py tests/kernels/test_kernel_compile.py \
	  tests/whole/test_attention_gpu.py tests/whole/test_training_gpu.py
