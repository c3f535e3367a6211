"""JSON Schema (draft 2020-12) of a run's JSON: sections, types, ranges and names. No torch.

Every reader may rely on it. Values that a run may lack are null or missing.
"""

import functools

from utils.columns import AMOUNT, COLUMNS, COUNT, NUMBER

HISTORY = {
    "type": "object",
    "properties": {
        "epoch": COUNT,
        "train_loss": NUMBER,
        "validation_loss": NUMBER,
        "validation_accuracy": NUMBER,
    },
}
# Keys of the JSON that are not columns of results.csv.
EXTRA = {
    "environment": {"script_s": AMOUNT},
    "training": {"history": {"type": "array", "items": HISTORY}},
}
REQUIRED = {
    "metrics": ["accuracy"],
    "timing": ["threads", "batch_size"],
    "provenance": ["data_sha256"],
    "data": ["negative_class", "positive_class"],
}
ALL_REQUIRED = ("run",)


def _sections() -> dict[str, dict[str, dict]]:
    """Rules of each section's keys."""
    sections = {}
    for column in COLUMNS:
        sections.setdefault(column.section, {})[column.name] = column.rule
    for section, rules in EXTRA.items():
        sections[section] |= rules
    return sections


SECTIONS = _sections()


def _schema() -> dict:
    """Put the rules of all sections together."""
    sections = {}
    for name, rules in SECTIONS.items():
        required = list(rules) if name in ALL_REQUIRED else REQUIRED.get(name, [])
        sections[name] = {"type": "object", "properties": rules, "required": required}
    sections["timing"] = {"type": "array", "minItems": 1, "items": sections["timing"]}
    layer = {"type": "object", "properties": {"layer": {"type": "string"}}, "required": ["layer"]}
    others = {"format": {"type": "integer"}, "layers": {"type": "array", "items": layer}}
    return {"type": "object", "required": ["format", *SECTIONS], "properties": sections | others}


def problem(record: object) -> str | None:
    """Say where and why `record`, read from JSON, breaks the schema; None if it does not."""
    import jsonschema  # not at the top: `--help` checks nothing

    error = jsonschema.exceptions.best_match(_validator().iter_errors(record))
    if error is None:
        return None
    where = ".".join(map(str, error.absolute_path)) or "the whole"
    reason = error.message if len(error.message) < 100 else f"{error.message[:97]}..."
    return f"{where}: {reason}"


@functools.cache
def _validator():
    import jsonschema

    return jsonschema.Draft202012Validator(_schema())
