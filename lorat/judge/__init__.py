"""Two sets of answers, a judge, a win rate."""
