"""The table of a comparison as CSV: one row per task, budget and method."""

import csv
import io
from typing import Any

from gradrank.report.comparison.view import Row, View, label
from gradrank.report.text import as_float

COLUMNS: tuple[str, ...] = (
    "task",
    "budget",
    "method",
    "reference",
    "matched",
    "metric",
    "higher_is_better",
    "mean",
    "low",
    "high",
    "sd",
    "seeds",
    "failed",
    "missing_seeds",
    "paired_seeds",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "p_corrected",
    "verdict",
    "parameters_peak",
    "parameters_final",
    "parameters_other",
    "learning_rate",
    "calibration_seconds",
    "train_seconds",
    "peak_memory_bytes",
    "runs",
)


def to_csv(view: View) -> str:
    """Write the table of a comparison as CSV.

    Numbers have all their digits; what is unknown is empty; seeds and runs are separated by spaces.
    Differences are positive where the method is better. A text that a spreadsheet would take for a
    formula gets a leading apostrophe.

    Args:
        view: The comparison.

    Returns:
        The text, its first row ``COLUMNS``.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in view.rows:
        writer.writerow({key: plain(value) for key, value in _fields(view, row).items()})
    return buffer.getvalue()


def _fields(view: View, row: Row) -> dict[str, Any]:
    found, cell = row.contrast, row.cell
    ends = row.interval or (None, None)
    difference = row.difference_interval or (None, None)
    return {
        "task": plain_text(row.task),
        "budget": plain_text(row.budget),
        "method": plain_text(row.method),
        "reference": plain_text(view.reference),
        "matched": cell.matched,
        "metric": plain_text(view.metric(row.task)),
        "higher_is_better": view.higher_is_better(row.task),
        "mean": row.mean,
        "low": ends[0],
        "high": ends[1],
        "sd": row.sd,
        "seeds": " ".join(str(each.seed) for each in row.outcomes),
        "failed": cell.failed,
        "missing_seeds": " ".join(str(seed) for seed in cell.missing),
        "paired_seeds": " ".join(str(seed) for seed in found.seeds) if found else "",
        "difference": row.difference,
        "difference_low": difference[0],
        "difference_high": difference[1],
        "p": as_float(found.p) if found else None,
        "p_corrected": row.p,
        "verdict": row.verdict,
        "parameters_peak": row.largest("peak"),
        "parameters_final": row.largest("final"),
        "parameters_other": row.largest("other"),
        "learning_rate": as_float(cell.lr),
        "calibration_seconds": row.average("calibration_seconds"),
        "train_seconds": row.average("train_seconds"),
        "peak_memory_bytes": row.largest("peak_memory_bytes"),
        "runs": plain_text(" ".join(label(each.run_id, 200) for each in row.outcomes)),
    }


def plain(value: Any) -> Any:
    """Return a value as a CSV file holds it.

    Args:
        value: The value.

    Returns:
        ``yes`` or ``no``, a whole number without a point, nothing for None; else the value.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    return "" if value is None else value


def plain_text(text: str) -> str:
    """Return an untrusted text as a CSV file holds it.

    Args:
        text: The text.

    Returns:
        One line; what a spreadsheet would take for a formula begins with an apostrophe.
    """
    shown = label(text, 10_000) if text else ""
    return f"'{shown}" if shown[:1] in {"=", "+", "-", "@"} else shown
