"""The log-prob kernel beside its rivals."""
