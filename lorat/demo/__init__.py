"""A small world with a known reward."""
