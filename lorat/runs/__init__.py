"""A run on disk: checkpoints, identity, journal, card, merging."""
