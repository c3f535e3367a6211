"""Engine-independent quantization: ranges, equalization, rounding, reconstruction, QAT, INT16 networks."""
