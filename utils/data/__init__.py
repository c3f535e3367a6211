"""The labelled images of a study, from the files on disk to augmented batches."""

from utils.data.loading import load_images

__all__ = ["load_images"]
