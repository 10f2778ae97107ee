"""A packed checkpoint becomes modules."""
