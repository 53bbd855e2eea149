"""Does a moving reference help? Studies with known rewards."""
