"""The main figures of a run, in a few lines."""

from utils import caveats, results


def summary(record: dict) -> str:
    """Summarize a run in a few lines: its main figures and their caveats."""
    quality, study = record["metrics"], record["run"]["study"]
    first = min(range(len(record["timing"])), key=lambda n: _order(record["timing"][n]))
    row = results.rows_of(record)[first]
    lines = [_in_short(row)]
    if row["agreement_reference"] is not None:
        lines.append(
            f"the method in exact arithmetic: accuracy {100 * row['accuracy_reference']:.2f} %, "
            f"{_db(row['sqnr_reference_db'], 'no noise')} from FP32; "
            f"the engine adds {_db(row['sqnr_vs_reference_db'], 'nothing')} "
            f"and agrees on {100 * row['agreement_reference']:.2f} %"
        )
    if row["dtype"] == "int8" and row["integer_layers"] is not None:
        lines.append(f"layers on integers: {row['integer_layers']} of {row['weight_modules']}")
    if row["accuracy_fake_quant"] is not None:
        lines.append(
            "before conversion, rounding in FP32: "
            f"accuracy {100 * row['accuracy_fake_quant']:.2f} %, "
            f"agrees on {100 * row['agreement_fake_quant']:.2f} %"
        )
    if seen := record["backend"].get("extremes"):
        largest = f"largest {seen['largest']:.4g}, in {seen['largest_in']}"
        lines.append(f"layer outputs on the test images: {seen['nonfinite']} not finite; {largest}")
    if "verdict" in quality and not study.endswith("_smoke"):
        lines.append(
            f"accuracy of FP32 within {100 * quality['margin']:g} points: {quality['verdict']}"
        )
    words = [words for words in caveats.of(row) if words != "contended"]  # said below, of all rows
    lines += [f"note: {sentence}" for sentence in caveats.explained(words, row["margin"])]
    if contended := [entry for entry in record["timing"] if entry.get("contended")]:
        (meaning,) = caveats.explained(["contended"], row["margin"])
        where = ", ".join(
            f"batch {entry['batch_size']} on {entry['threads']} threads" for entry in contended
        )
        lines.append(f"note: {meaning} It was at {where}.")
    return "\n".join(lines)


def _db(sqnr: float | None, none: str) -> str:
    return none if sqnr is None else f"{sqnr:.1f} dB"


def _order(entry: dict) -> tuple:
    return -entry["threads"], entry["batch_size"] or 0


def _in_short(row: dict) -> str:
    low, high = 100 * row["accuracy_ci_low"], 100 * row["accuracy_ci_high"]
    parts = [
        f"{results.run_id(row)}: accuracy {100 * row['accuracy']:.2f} % [{low:.2f}, {high:.2f}]",
        f"agrees with FP32 on {100 * row['agreement_fp32']:.2f} %",
        *([] if row["sqnr_db"] is None else [f"SQNR {row['sqnr_db']:.1f} dB"]),
        f"{row['size_mb']:.2f} MiB",
    ]
    if row["batch_size"] is None:
        return ", ".join([*parts, "simulated: not timed"])
    time = f"{row['latency_ms_p50']:.2f} ms at batch {row['batch_size']}"
    if row["tier"] == "smoke":
        return ", ".join([*parts, f"{time} (smoke: no measurement)"])
    contended = "; contended" if row["contended"] else ""
    eager, best = row["speedup_vs_eager_fp32"], row["speedup_vs_best_fp32"]
    return ", ".join(
        [
            *parts,
            f"{time} ({eager:.2f}x eager FP32, "
            f"{best:.2f}x the fastest FP32, {row['best_fp32']}{contended})",
        ]
    )
