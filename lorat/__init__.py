"""lorat: align language models on preference data with a moving reference, on one consumer GPU.

The names below load on first use, so that `import lorat` is quick and `lorat.reference` needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "TrustRegionConfig": "settings.config",
    "TrustRegionTrainer": "train.trainer",
    "Adaptive": "reference",
    "Frozen": "reference",
    "Hard": "reference",
    "Soft": "reference",
    "blend_": "reference",
    "copy_": "reference",
    "distance": "reference",
    "extrapolate_": "reference",
    "interpolate_": "reference",
    "preset": "reference",
    "snapshot": "reference",
    "soup_": "reference",
    "ReferenceSyncCallback": "train.callback",
    "LoratError": "errors",
}
__all__ = [
    "Adaptive",
    "Frozen",
    "Hard",
    "LoratError",
    "ReferenceSyncCallback",
    "Soft",
    "TrustRegionConfig",
    "TrustRegionTrainer",
    "__version__",
    "blend_",
    "copy_",
    "distance",
    "extrapolate_",
    "interpolate_",
    "preset",
    "snapshot",
    "soup_",
]

if TYPE_CHECKING:
    from .errors import LoratError
    from .reference import (
        Adaptive,
        Frozen,
        Hard,
        Soft,
        blend_,
        copy_,
        distance,
        extrapolate_,
        interpolate_,
        preset,
        snapshot,
        soup_,
    )
    from .settings.config import TrustRegionConfig
    from .train.callback import ReferenceSyncCallback
    from .train.trainer import TrustRegionTrainer


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module 'lorat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
