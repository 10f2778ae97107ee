"""Text to token batches."""
