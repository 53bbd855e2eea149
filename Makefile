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
	@$(VENV)/bin/python -m pytest -q

lint:
	@scripts/setup-venv.sh dev
	@$(VENV)/bin/ruff check lorat kernels tests
	@$(VENV)/bin/ruff format --check lorat kernels tests
	@$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) demo-output build *.egg-info
