"""Rooms import rooms above them, and the layout holds the traps that were found once."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.helpers.worlds import ROOT

# A room imports only rooms that stand no later than its own. `lorat` itself (its version) may be imported by all.
ORDER = (
    "errors files ranks reference data packs methods model runs plan measure settings train judge report sweep demo cli"
).split()
OLD_NAMES = {"losses": "methods", "sync_callback": "train"}  # one-line re-exports, for one release
FILES = sorted((ROOT / "lorat").rglob("*.py"))


def room(path: Path) -> str:
    """The room that a file of lorat stands in: its folder, or its own name at the top."""
    parts = path.relative_to(ROOT / "lorat").parts
    return parts[0].removesuffix(".py")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """`(rooms of lorat, top-level packages of others)` that a file imports, wherever in it, at run time or for types."""
    here = ("lorat", *path.relative_to(ROOT / "lorat").parts[:-1])
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = ".".join(here[: len(here) - node.level + 1])
            inside = f"{above}.{node.module}" if node.module else above
            found = [inside] if inside != "lorat" else [f"lorat.{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module] if node.module != "lorat" else [f"lorat.{a.name}" for a in node.names]
        else:
            continue
        for name in found:
            top, _, rest = name.partition(".")
            (ours if top == "lorat" else others).add(rest.partition(".")[0] if top == "lorat" else top)
    return ours, others


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "lorat")))
def test_a_room_imports_only_rooms_above_it(path):
    name = room(path)
    if name in ("__init__", "__main__"):
        return  # the package's door and the command's
    own = ORDER.index(OLD_NAMES.get(name, name))
    later = {r for r in imports(path)[0] - {"__version__"} if ORDER.index(r) > own}
    assert not later, f"{name} imports {sorted(later)}, which stand later"


def test_every_room_is_listed():
    rooms = {room(p) for p in FILES} - {"__init__", "__main__", *OLD_NAMES}
    assert rooms <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "lorat")))
def test_what_a_room_imports_of_others(path):
    others = imports(path)[1]
    assert not {"trl", "pytest"} & others  # oracles of the tests
    if room(path) == "reference" or path == ROOT / "lorat/methods/losses.py":
        assert others <= {
            "torch",
            "math",
            "re",
            "json",
            "pathlib",
            "collections",
            "dataclasses",
            "typing",
            "__future__",
        }


@pytest.mark.parametrize("module", ["lorat.methods.losses", "lorat.losses", "lorat.reference"])
def test_the_losses_and_the_reference_want_torch_alone(module):
    code = (
        f"import sys, {module}; "
        "print([m for m in ('transformers', 'peft', 'bitsandbytes', 'accelerate', 'datasets') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.strip() == "[]"


PUBLIC = {
    "lorat": "TrustRegionConfig TrustRegionTrainer ReferenceSyncCallback LoratError Adaptive Frozen Hard Soft blend_ copy_ "
    "distance extrapolate_ interpolate_ preset snapshot soup_ __version__",
    "lorat.reference": "POLICY PRESETS REFERENCE SPACES Adaptive Frozen Hard Soft Space UpdateRule adapter_parameters blend_ "
    "copy_ distance extrapolate_ interpolate_ paired preset relative_distance snapshot soup_",
    "lorat.losses": "dpo_loss ipo_loss kto_loss kto_baseline PairLoss UnpairedLoss",
    "lorat.methods.losses": "dpo_loss ipo_loss kto_loss kto_baseline PairLoss UnpairedLoss",
    "lorat.sync_callback": "ReferenceSyncCallback",
    "lorat_kernels": "linear_logprob",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_keep_working(module):
    there = import_module(module)
    assert all(hasattr(there, name) for name in PUBLIC[module].split())


def test_the_package_lists_its_names():
    import lorat

    assert set(PUBLIC["lorat"].split()) == set(lorat.__all__) == set(dir(lorat))


def test_kernels_is_no_package_so_that_transformers_can_be_imported_from_here():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from transformers import Trainer; import lorat_kernels; print(lorat_kernels.linear_logprob)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_the_big_config_is_known_to_few_rooms():
    """Below, a function takes a small value of its own: what to load, an adapter, a method, a rule, a workload."""
    naming = {room(p) for p in FILES if "TrustRegionConfig" in p.read_text()}
    assert naming <= {"__init__", "settings", "train", "demo", "cli"}
