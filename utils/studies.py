"""Names of studies: each is the folder of a study in results, figures and checkpoints."""

import re

DRAWN = "drawn"  # the generated images
DISSERTATIONS = "cats_and_dogs"  # the dissertation's images, Kaggle's "Cat and Dog"
SMOKE_SUFFIX = "_smoke"


def is_dissertations(study: str) -> bool:
    """Whether a study uses the dissertation's images, so that its figures compare with them.

    The name may end in a digest, see `study_name`. `slug` gives it to no other data set.
    """
    return study.startswith(DISSERTATIONS)


def slug(*words: str) -> str:
    """Return `words` as [a-z0-9_]+ for a study of a user's images, distinct from reserved names."""
    parts = [re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_") for word in words]
    name = "_".join(filter(None, parts)) or "data"
    if name == DRAWN or is_dissertations(name) or name.endswith(SMOKE_SUFFIX):
        return "data_" + name.replace(SMOKE_SUFFIX, "smoke")
    return name


def study_name(study: str, digest: str, known: str | None) -> str:
    """Name the study of the images with the hexadecimal hash `digest`.

    `known` is the hash of the images whose runs the folder `study` already holds, or None. If it
    differs, the first 8 digits of `digest` are appended. So all rows of a table are about the same
    images, and no study has to be moved away first.
    """
    return study if known in (None, digest) else f"{study}_{digest[:8]}"
