"""`lorat.methods.losses` under its old name, for one release."""

from .methods.losses import *  # noqa: F403
