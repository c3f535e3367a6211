"""Engine-independent quantization: ranges, equalization, rounding, reconstruction, QAT, INT16 networks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"placement": ["Placement"], "quantized": ["Quantized"]}
)
