"""A batch as rows that share prompts, and the attention that computes them."""
