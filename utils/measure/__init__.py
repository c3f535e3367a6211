"""Measurement of one deployed network, from its file to its record in results/."""

from utils.measure.again import again
from utils.measure.record import run

__all__ = ["again", "run"]
