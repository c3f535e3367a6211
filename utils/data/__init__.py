"""The labelled images of a study, from the files on disk to augmented batches."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"loading": ["find", "load", "open_source"], "dataset": ["Data", "Split"]},
)
