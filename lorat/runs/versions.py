"""Which versions were at work, for run folders, model cards and evaluations."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from .. import __version__

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


def versions(packages: Sequence[str] = PACKAGES, missing: str = "unknown") -> dict[str, str]:
    """`{"python": …, "lorat": …}` and so on; a package that has no metadata (a bare checkout, say) is `missing`."""
    found = {"python": platform.python_version(), "lorat": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = missing
    return found
