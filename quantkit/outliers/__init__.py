"""Statistics become a plan: which channels of each site leave the 4-bit path."""
