"""Checkpoint and tokens to statistics."""
