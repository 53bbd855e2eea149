"""`lorat.train.callback` under its old name, for one release."""

from .train.callback import ReferenceSyncCallback as ReferenceSyncCallback
