"""Engine-independent quantization: ranges, bias correction, sensitivity, INT16 networks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"sensitivity": ["choose_fp32_blocks"]})
