"""Which format each site should get for a budget of bits: measured, then checked."""
