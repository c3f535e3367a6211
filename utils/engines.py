"""The backends that a script deploys on, and the recipe for each."""

from collections.abc import Iterator

from utils import measure, mixed_precision
from utils.backends import registry
from utils.backends.base import Backend
from utils.experiment import Experiment
from utils.recipes import Int8, Recipe


def select(experiment: Experiment, recipe: Recipe) -> Iterator[tuple[Backend, Recipe]]:
    """Yield each backend to deploy on, and the recipe for it.

    These are the backends of the options that can run here, and `recipe`. With `--backend fastest`
    there is one, chosen by measured latency. With `formats="auto"` in the recipe, the modules in
    FP32 are chosen in the same way. With `--again`, there are none: the finished runs on these
    backends are timed in another session instead. Raises `UserError` if no backend can run, or if
    none is within the budget.
    """
    able = registry.select(experiment.options)
    if experiment.options.again:
        for backend in able:
            measure.again(experiment, backend)
        return
    if experiment.options.fastest:
        backend, recipe = mixed_precision.fastest(experiment, list(able), recipe)
        able = [backend]
    for backend in able:
        if isinstance(recipe, Int8) and recipe.formats == "auto":
            yield backend, mixed_precision.choose_formats(experiment, backend, recipe)
        else:
            yield backend, recipe
