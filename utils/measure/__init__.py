"""Measure one deployed network, from its file to its record in results/."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"record": ["run"]})
