"""The engines that deploy a network, by the names that `--backend` takes.

Each engine turns a float network into a *deployed artifact*, a file, and loads that file as a
function from a batch of images to logits. All measurements are of the file, after another process
has loaded it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"registry": ["get", "problem", "select"], "base": ["Backend", "Deployed"]},
)
