"""Equivalent transforms: checkpoint to checkpoint, the function of the model unchanged."""
