"""What was found, in plain words: never more than the contrasts allow."""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from gradrank.evidence.comparison import Pooled
from gradrank.report.blocks import Paragraph
from gradrank.report.comparison.figures_rates import Search
from gradrank.report.comparison.view import Row, View, label
from gradrank.report.text import count, listed, plural

FEW_SEEDS = 5
# Matched methods that use more than this many times the reference's parameters are named.
_MORE = 1.005


def overall(view: View) -> str:
    """Say how many differences are evidence of anything.

    Args:
        view: The comparison.

    Returns:
        Sentences.
    """
    compared = [row for row in view.rows if row.verdict != "reference" and row.cell.matched]
    base = label(view.reference)
    if not view.rows:
        return "No run of the reported phase is there yet, so there is nothing to compare."
    counted = Counter(row.verdict for row in compared)
    tested = sum(counted[verdict] for verdict in ("better", "worse", "no evidence"))
    if not tested:
        return (
            f"No method could be tested against {base}: that takes at least two seeds that both "
            "have finished. Nothing here is evidence for or against any method."
        )
    text = f"Of {plural(tested, 'tested difference')} to {base}, {_shared(counted, tested)}"
    text += ", after correction for the number of tests."
    if counted["not tested"]:
        text += f" {count(counted['not tested'])} more could not be tested."
    return text


def _shared(counted: Counter[str], tested: int) -> str:
    none = counted["no evidence"]
    if none == tested:
        return "none is evidence of a difference" if tested > 1 else "it is no evidence"
    parts = [f"{count(none)} {'shows' if none == 1 else 'show'} no evidence of a difference"]
    for verdict in ("better", "worse"):
        number = counted[verdict]
        parts.append(
            f"{count(number) if number else 'none'} {'are' if number > 1 else 'is'} {verdict}"
        )
    return listed(parts)


def sentence(view: View, task: str, budget: str) -> str:
    """Say what was found at one budget on one task.

    Args:
        view: The comparison.
        task: The task.
        budget: The budget.

    Returns:
        A sentence.
    """
    rows = [row for row in view.of(task, budget) if row.verdict != "reference"]
    held = [row for row in rows if row.cell.matched]
    parts = _parts(held, [row for row in rows if not row.cell.matched])
    where = f"at budget {label(budget)} on {label(task)}"
    if not parts:
        return f"Against {label(view.reference)}, {where}: no other method."
    return f"Against {label(view.reference)}, {where}: {'; '.join(parts)}."


def _parts(held: Sequence[Row], free: Sequence[Row]) -> list[str]:
    tested = [row for row in held if row.verdict != "not tested"]
    none = [row for row in tested if row.verdict == "no evidence"]
    parts = []
    if tested:
        share = f"{count(len(none))} of {plural(len(tested), 'tested arm')}"
        parts.append(f"no evidence of a difference for {share}")
    for verdict in ("better", "worse"):
        found = [row for row in tested if row.verdict == verdict]
        if found:
            parts.append(f"{verdict}: {_names(found)}")
    silent = [row for row in held if row.verdict == "not tested"]
    if silent:
        parts.append(f"not tested: {_names(silent)}")
    for verdict in ("better", "worse"):
        found = [row for row in free if row.verdict == verdict]
        if found:
            parts.append(f"{verdict}, but not held to the budget: {_names(found)}")
    return parts


def _names(rows: Sequence[Row]) -> str:
    return listed(label(row.method, 40) for row in rows)


def pooled_sentence(view: View) -> str:
    """Say what the differences over all tasks show.

    Args:
        view: The comparison.

    Returns:
        A sentence, or "" where nothing was pooled.
    """
    rows = [each for each in view.source.pooled if each.method not in view.unmatched]
    tested = [each for each in rows if each.verdict != "not tested"]
    if not tested:
        return ""
    parts = []
    for verdict in ("better", "worse"):
        found = [each for each in tested if each.verdict == verdict]
        if found:
            parts.append(f"{verdict}: {listed(_placed(each) for each in found)}")
    none = sum(1 for each in tested if each.verdict == "no evidence")
    start = f"no evidence of a difference for {count(none)} of {count(len(tested))}"
    return f"Over all tasks together: {'; '.join([start, *parts])}."


def _placed(each: Pooled) -> str:
    return f"{label(each.method, 40)} at {label(each.budget, 30)}"


def limits(view: View, searched: Sequence[Search]) -> list[Paragraph]:
    """Say what speaks against reading more into the numbers.

    Args:
        view: The comparison.
        searched: The searches for learning rates.

    Returns:
        Paragraphs; warnings first.
    """
    found = [_rates(view, searched), _sizes(view), _seeds(view), _power(view)]
    shown = [paragraph for paragraph in found if paragraph is not None]
    return sorted(shown, key=lambda paragraph: paragraph.tone != "warn")


def _rates(view: View, searched: Sequence[Search]) -> Paragraph | None:
    if not any(row.outcomes for row in view.rows):
        return None
    if not searched:
        text = (
            "These records hold no search for learning rates, so a difference may come from a rate "
            "that suits one method and not the other."
        )
        return Paragraph(text, "note", "Learning rates.")
    edge = [search for search in searched if search.at_edge]
    if not edge:
        return None
    methods = listed(label(m, 40) for m in dict.fromkeys(search.method for search in edge))
    text = (
        f"In {plural(len(edge), 'search').replace('searchs', 'searches')} of "
        f"{count(len(searched))} the best or the chosen rate is the lowest or highest that was "
        f"tried, so a better one may lie outside: {methods}."
    )
    return Paragraph(text, "warn", "Learning rates.")


def _sizes(view: View) -> Paragraph | None:
    base = {
        (row.task, row.budget): row.largest("peak")
        for row in view.rows
        if row.verdict == "reference"
    }
    factors: dict[str, float] = {}
    for row in view.rows:
        size, other = row.largest("peak"), base.get((row.task, row.budget))
        if row.cell.matched and size and other and size > _MORE * other:
            factors[row.method] = max(factors.get(row.method, 1.0), size / other)
    if not factors:
        return None
    named = listed(f"{label(m, 40)} (up to {factor:.2f} times)" for m, factor in factors.items())
    text = (
        f"At some time these used more adapter parameters than {label(view.reference)}: {named}. "
        "The table gives the peak and the final count."
    )
    return Paragraph(text, "note", "Parameters.")


def _seeds(view: View) -> Paragraph | None:
    counts = {len(row.outcomes) for row in view.rows if row.outcomes}
    if not counts or min(counts) >= FEW_SEEDS:
        return None
    low, high = min(counts), max(counts)
    have = plural(high, "seed") if low == high else f"{low} to {high} seeds"
    text = f"Methods have {have} here. With few seeds only large differences can be told apart."
    return Paragraph(text, "note", "Few seeds.")


def _power(view: View) -> Paragraph | None:
    parts = []
    for task in view.tasks:
        halves = [
            (ends[1] - ends[0]) / 2
            for row in view.of(task)
            if row.verdict == "no evidence" and (ends := row.difference_interval) is not None
        ]
        if halves:
            parts.append(f"±{view.value(task, median(halves))} on {label(task, 40)}")
    if not parts:
        return None
    text = (
        "No evidence of a difference is not evidence that there is none. Around such differences "
        f"the 95 % intervals reach, in the median, {listed(parts)}: a true difference of about "
        "that size or less would go unseen."
    )
    return Paragraph(text, "note", "What could be seen.")
