"""Checkpoints -> numbers: perplexity, tasks, diagnosis, and the report that shows them."""
