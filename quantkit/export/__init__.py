"""The packed checkpoint as others read it: names and configurations, no foreign library."""
