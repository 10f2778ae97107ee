"""Checkpoint directories: the only folder that reads and writes model files."""
