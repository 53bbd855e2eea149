"""The moving reference's errors and its cost."""
