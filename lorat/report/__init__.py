"""A run's files -> one page."""
