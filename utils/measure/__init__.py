"""Measurement of one deployed network, from its file to its record in results/."""
