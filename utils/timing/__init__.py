"""Time inference: worker processes, alternating rounds, the fastest FP32, choices by latency, the protocol."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"choice": ["plans"], "protocol": ["measure"], "worker": ["Worker"]}
)
