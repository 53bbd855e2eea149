"""What the models of a run are worth."""
