"""Measurements with their gates: what the README's numbers come from."""
