"""Where rounding loses accuracy: sets of sites rounded and spared in one pass, and a page."""
