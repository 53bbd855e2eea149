"""Imports point one way, and the layout holds the traps that were found once."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each module of lorat may import of lorat; `errors` may be imported by all.
ARROWS = {
    "lowrank": set(),
    "pairing": {"lowrank"},
    "blending": {"lowrank", "pairing"},
    "rules": {"blending", "pairing"},
    "reference": {"blending", "pairing", "rules"},
    "sync_callback": {"reference"},
    "losses": set(),
    "errors": set(),
    "metrics": set(),
    "packing": set(),
    "checkpoint": set(),
    "toy": set(),
    "formats": set(),
    "tokenization": {"formats"},
    "coercion": {"sources"},
    "sources": set(),
    "trl": {"coercion", "config", "sources"},
    "validation": {"config", "reference"},  # config for its type alone
    "reading": {"formats"},
    "data": {"formats", "reading", "tokenization"},
    "config": {"reference", "validation"},
    "identity": {"config", "data"},
    "base": {"config"},
    "adapters": {"base", "config", "reference"},
    "attention": {"packing"},
    "fused": set(),
    "logprobs": {"adapters", "attention", "packing"},
    "probe": {"attention", "logprobs", "packing"},
    "blueprint": {"adapters", "base", "config", "reference"},
    "ledger": set(),
    "stand_ins": {"attention", "ledger", "logprobs"},
    "simulation": {"attention", "blueprint", "config", "fused", "ledger", "logprobs", "packing", "stand_ins"},
    "optimiser_memory": {"config", "ledger"},
    "memory": {"blueprint", "config", "lowrank", "optimiser_memory", "reference", "simulation"},
    "fitting": {"config", "memory"},
    "objectives": {"config", "logprobs", "losses", "packing"},
    "engine": {"config", "logprobs", "losses", "objectives", "packing"},
    "estimators": set(),
    "store": set(),
    "run_folder": {"adapters", "checkpoint", "reference"},
    "lineup": {"adapters", "base", "config", "fused", "logprobs", "reference", "run_folder", "tokenization"},
    "generation": {"lineup", "logprobs", "store", "tokenization"},
    "evaluation": {"estimators", "generation", "lineup", "logprobs", "packing", "probe", "store"},
    "prompts": {"formats", "reading", "tokenization"},
    "samples": {"prompts"},
    "eval_report": set(),
    "eval_run": {"base", "estimators", "evaluation", "generation", "lineup", "packing", "store", "tokenization"},
    "run_options": {"lineup", "run_folder"},
    "answers": set(),
    "verdicts": set(),
    "judge_prompts": {"verdicts"},
    "judge_client": set(),
    "judge": {"answers", "judge_client", "judge_prompts", "verdicts"},
    "run_log": {"checkpoint"},
    "report_plots": {"run_log"},
    "report_tables": {"answers", "run_log"},
    "versions": {"__version__"},
    "report": {"report_plots", "report_tables", "run_log", "versions"},
    "commands_judge": {"answers", "judge", "judge_client", "judge_prompts", "report"},
}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """`(modules of lorat, top-level packages of others)` that a file imports, wherever in it."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            ours |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {a.name.split(".")[0] for a in node.names}
    return ours, others


@pytest.mark.parametrize("name", ARROWS)
def test_imports_point_one_way(name):
    ours, others = imports(ROOT / "lorat" / f"{name}.py")
    assert ours - {"errors"} <= ARROWS[name]
    if name in ("reference", "rules", "blending", "pairing", "lowrank", "losses"):
        assert others <= {"torch", "math", "re", "collections", "dataclasses", "typing", "__future__"}


@pytest.mark.parametrize("path", sorted((ROOT / "lorat").glob("*.py")), ids=lambda p: p.name)
def test_trl_is_a_test_dependency_alone(path):
    assert not {"trl", "pytest"} & imports(path)[1]


def test_kernels_is_no_package_so_that_transformers_can_be_imported_from_here():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from transformers import Trainer; import lorat_kernels; print(lorat_kernels.linear_logprob)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
