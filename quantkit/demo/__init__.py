"""The whole pipeline on a small real model, for a first look."""
