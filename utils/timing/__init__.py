"""Time inference: worker processes, alternating rounds, the fastest FP32, the protocol."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"protocol": ["measure"], "worker": ["Worker"]})
