"""Engine-independent quantization: ranges, equalization, reconstruction, QAT, INT16 networks."""
