"""The engines that deploy a network, by the names that `--backend` takes.

Each engine turns a network into a *deployed artifact*, a file, and loads that file as a function
from a batch of images to logits. All measurements are of the file, after another process has
loaded it.
"""
