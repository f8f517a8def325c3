"""Growth study: the tables of the part ``error``."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.growth_error import FULL as MODEL
from benchmarks.pages import markdown

Row = Mapping[str, Any]
OTHER = "exact, other mini-batches"


def setting(rows: Mapping[str, Row]) -> str:
    """Return what the part ``error`` was measured on, in words."""
    count = sum(row["targets"] for row in rows.values())
    widths = ", ".join(str(w) for w in sorted({w for row in rows.values() for w in row["widths"]}))
    exact = [row["dense_ranks"]["0.9"] for row in rows.values()]
    low, high = min(low for low, _, _ in exact), max(high for _, _, high in exact)
    return (
        f"{MODEL.model} (pre-trained weights), sentences of movie reviews, M = {MODEL.batches} "
        f"mini-batches of {MODEL.batch} x {MODEL.length} tokens. {len(rows)} of {MODEL.groups} "
        f"groups of blocks, {count} targets with sides of {widths}. Exact effective ranks at "
        f"energy 0.9: {low} to {high}."
    )


def pooled(rows: Mapping[str, Row], key: str, *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return entries of all groups and seeds together, by their settings.

    Args:
        rows: Rows of the part ``error``.
        key: Key of the entries.
        names: Settings to tell them apart by.
    """
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows.values():
        for entry in row[key]:
            found.setdefault(tuple(entry[name] for name in names), []).append(entry)
    return found


def spectra(rows: Mapping[str, Row]) -> str:
    """Return errors by sketch size; the last line is another sample of mini-batches."""
    head = (
        *("sketch", "k", "seeds", "Gram error, mean", "range over seeds", "worst target"),
        *("effective rank equal", "mean difference", "largest", "Spearman", "plan elsewhere"),
        *("equal at 0.5", "plan elsewhere at 0.5"),
    )
    lines = []
    for (sketch, k, buckets), entries in pooled(rows, "spectra", "sketch", "k", "buckets").items():
        size = str(k) if sketch == "gauss" else f"{k} ({buckets})"
        seeds = {entry["seed"] for entry in entries}
        lines.append((sketch, size, str(len(seeds)), *_agreement(entries)))
    other = [row["other_batches"] for row in rows.values()]
    lines.append((OTHER, *[""] * 5, *_ranks_and_plans(other)))
    return markdown(head, lines)


def _agreement(entries: Sequence[Row]) -> tuple[str, ...]:
    by_seed: dict[Any, list[float]] = {}
    for entry in entries:
        by_seed.setdefault(entry.get("seed"), []).append(entry["gram_error"])
    over = [mean(values) for values in by_seed.values()]
    return (
        f"{mean(over):.3f}",
        f"{min(over):.3f} to {max(over):.3f}" if len(over) > 1 else "",
        f"{max(entry['gram_error_worst'] for entry in entries):.2f}",
        *_ranks_and_plans(entries),
    )


def _ranks_and_plans(entries: Sequence[Row]) -> tuple[str, ...]:
    usual, low = ([entry[energy] for entry in entries] for energy in ("0.9", "0.5"))
    return (
        f"{average(usual, 'equal'):.0%}",
        f"{average(usual, 'apart_mean'):.2f}",
        str(max(entry["apart_most"] for entry in usual)),
        f"{average(usual, 'spearman'):.2f}",
        f"{average(usual, 'plan_elsewhere'):.1%}",
        f"{average(low, 'equal'):.0%}",
        f"{average(low, 'plan_elsewhere'):.1%}",
    )


def average(entries: Sequence[Row], key: str) -> float:
    """Return the mean of what is known, NaN if nothing is.

    Args:
        entries: The entries.
        key: The key.
    """
    values = [entry[key] for entry in entries if entry[key] is not None]
    return mean(values) if values else float("nan")


def directions(rows: Mapping[str, Row]) -> str:
    """Return errors of singular values by directions asked for."""
    head = (
        *("directions (kept)", "seeds", "largest value", "worst target", "first 8"),
        *("second half", "plan elsewhere"),
    )
    lines = []
    for (asked, kept), entries in pooled(rows, "directions", "directions", "kept").items():
        seeds = {entry["seed"] for entry in entries}
        lines.append((f"{asked} ({kept})", str(len(seeds)), *_fidelity(entries)))
    other = [row["directions_other_batches"] for row in rows.values() if row["directions"]]
    if other:
        lines.append((OTHER, "", *_fidelity(other)))
    return markdown(head, lines)


def _fidelity(entries: Sequence[Row]) -> tuple[str, ...]:
    keys = ("first", "first_worst", "leading", "second_half", "plan_elsewhere")
    found = {key: average(entries, key) for key in keys}
    return tuple("" if value != value else f"{value:.1%}" for value in found.values())  # noqa: PLR0124
