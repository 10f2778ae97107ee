"""Structure: names and shapes of a model's linears, and one decoder block at a time."""
