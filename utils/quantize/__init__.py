"""Quantization apart from any engine: ranges, equalization, AdaRound, reconstruction, QAT."""

from utils.quantize.methods import ptq, start_qat

__all__ = ["ptq", "start_qat"]
