"""Will it fit? A training step without values."""
