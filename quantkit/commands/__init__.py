"""One file per verb: its options, one call to its stage, its output."""
