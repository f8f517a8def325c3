"""The section on neuron partitions: which rows got the larger rank, why, and how far runs agree."""

from collections.abc import Mapping, Sequence

from gradrank.report.blocks import Block, Gallery, Paragraph, Section
from gradrank.report.figures_bands import partition_bands, partitions_compared
from gradrank.report.figures_gradient import gradient_maps
from gradrank.report.figures_hits import hit_histogram
from gradrank.report.figures_overlap import overlap_by_type, overlap_matrix
from gradrank.report.figures_shares import dominant_shares
from gradrank.report.layout import Layout
from gradrank.report.overlap import CLEAR
from gradrank.report.pairs import MAX_RUNS, Pair, all_pairs, labelled
from gradrank.report.svg import Figure
from gradrank.report.tables_neurons import overlap_table, partition_table
from gradrank.report.text import count, listed, number, percent, plural
from gradrank.report.view import Run

# Bands of every layer, hit histograms and words: for so many runs; maps: so many in all.
MAX_SHOWN = 4
MAX_MAPS = 4
_VERDICTS = {
    "more than chance": "more than chance gives",
    "like chance": "about as much as chance gives",
    "less than chance": "less than chance gives",
}


def neurons_section(runs: Sequence[Run], layout: Layout) -> Section:
    """Draw what is known of neurons.

    Args:
        runs: The runs.
        layout: Where each target stands.

    Returns:
        The section; without blocks if no run has a partition or a gradient map.
    """
    by_label = labelled(runs)
    blocks: list[Block] = list(notes(by_label, len(runs) > 1))
    pairs = all_pairs(by_label, layout)
    labels = [name for name in by_label if any(name in {p.first, p.second} for p in pairs)]
    if pairs:
        blocks.append(agreement(pairs))
    if len(by_label) > MAX_RUNS:
        blocks.append(Paragraph(f"Overlap is shown between the first {count(MAX_RUNS)} runs."))
    compared = partitions_compared([by_label[name] for name in labels], labels, layout)
    whole = dominant_shares(by_label, layout)
    blocks += _gallery([compared, whole, overlap_by_type(pairs), overlap_matrix(labels, pairs)])
    if pairs:
        blocks.append(overlap_table(pairs))
    if len(by_label) > MAX_SHOWN:
        text = (
            f"Bands of every layer and hits are drawn for the first {count(MAX_SHOWN)} of "
            f"{count(len(by_label))} runs."
        )
        blocks.append(Paragraph(text))
    mapped = [*by_label.values(), *(run for run in runs if not run.splits)]
    blocks += _gallery([*_single(list(by_label.values())[:MAX_SHOWN], layout), *_maps(mapped)])
    table = partition_table(by_label, layout)
    if table is not None:
        blocks.append(table)
    return Section("neurons", "Which neurons got the capacity", blocks)


def notes(runs: Mapping[str, Run], named: bool) -> list[Paragraph]:
    """Say how runs came to their partitions; runs of which the same can be said share a paragraph.

    Args:
        runs: The runs with partitions, by label.
        named: Whether labels stand in front.

    Returns:
        The paragraphs; none without runs.
    """
    told: dict[str, list[str]] = {}
    for label, run in runs.items():
        told.setdefault(_story(run, len(runs) == 1), []).append(label)
    ranks = (
        "Where a rank is shown elsewhere, it is r + r', the rank of the stock LoRA that holds both "
        "groups of rows; parameters count only what is trained."
    )
    paragraphs = [
        Paragraph(text, "note", f"{listed(labels)}." if named else "")
        for text, labels in told.items()
        if text
    ]
    return [*paragraphs, Paragraph(ranks)] if runs else []


def _story(run: Run, alone: bool) -> str:
    splits = run.splits
    words = [_looks(run)]
    whole = sum(1 for entry in run.planned.values() if entry.rank)
    if len(splits) < whole:
        words.append(
            f"{count(len(splits))} of {plural(whole, 'target')} with an adapter hold a neuron "
            "partition; in the others all rows have one rank."
        )
    empty = sum(1 for split in splits.values() if not split.is_split)
    if empty:
        words.append(
            f"In {plural(empty, 'target')} all neurons or none are dominant: they hold one rank."
        )
    peak, end = run.peak, run.parameters
    if alone and run.neurons is not None and peak and end and peak != end:
        words.append(f"The adapter went from {count(peak)} parameters to {count(end)}.")
    return " ".join(filter(None, words))


def agreement(pairs: Sequence[Pair]) -> Paragraph:
    """Say whether runs choose the same neurons more often than chance would.

    Args:
        pairs: The overlaps, at least one.

    Returns:
        The paragraph.
    """
    if len(pairs) == 1:
        words = [_one(pairs[0])]
    else:
        verdicts = [pair.whole.verdict for pair in pairs]
        told = [
            f"{count(n)} {'shares' if n == 1 else 'share'} {words}"
            for verdict, words in _VERDICTS.items()
            if (n := verdicts.count(verdict))
        ]
        said = listed(told) if told else "none can be judged"
        words = [f"Of {count(len(pairs))} pairs of runs, {said}.", *_kinds(pairs)]
    words.append(
        "Standard deviations are those of random sets with the same sizes in every target; more "
        f"than {number(CLEAR)} count as clear. With many neurons even a small excess is clear, so "
        "its size matters too; and a model's large rows may be chosen whatever the task."
    )
    return Paragraph(" ".join(words), "note", "Do runs agree?")


def _looks(run: Run) -> str:
    known = run.neurons
    if known is None:
        return ""
    words = []
    if known.looks is not None:
        every = f", one every {plural(known.interval, 'step')}" if known.interval else ""
        words.append(f"{plural(known.looks, 'look')} at the gradients{every}.")
    rule = f" by the rule '{known.rule}'" if known.rule else ""
    when = f"After step {count(known.step)} the" if known.step is not None else "The"
    if run.splits:
        words.append(f"{when} output neurons of each target were split{rule}.")
    return " ".join(words)


def _one(pair: Pair) -> str:
    found = pair.whole
    if found.z is None:
        return f"{pair.first} and {pair.second}: the sets leave nothing to compare."
    away = f"{number(abs(found.z), 3)} standard deviations {'above' if found.z > 0 else 'below'}"
    return (
        f"{pair.first} and {pair.second} share {percent(found.jaccard)} of the neurons that are "
        f"dominant in either; random sets would share {percent(found.chance)}. That is "
        f"{found.verdict} ({away})."
    )


def _kinds(pairs: Sequence[Pair]) -> list[str]:
    """Compare pairs of one task with pairs of different tasks, where both are known."""
    pairs = [pair for pair in pairs if pair.same_way]
    kinds: Mapping[str, Sequence[Pair]] = {
        "one task and different seeds": [p for p in pairs if p.same_task and p.same_seed is False],
        "different tasks": [p for p in pairs if p.same_task is False],
    }
    parts = []
    for kind, chosen in kinds.items():
        known = [p.whole for p in chosen if p.whole.jaccard is not None]
        if known:
            mean = sum(o.jaccard or 0 for o in known) / len(known)
            chance = sum(o.chance or 0 for o in known) / len(known)
            parts.append(
                f"Runs of {kind} share {percent(mean)} on average ({percent(chance)} by chance)."
            )
    return parts if len(parts) > 1 else []


def _single(runs: Sequence[Run], layout: Layout) -> list[Figure | None]:
    suffixes = [f"-{i + 1}" if i else "" for i in range(len(runs))]
    several = len(runs) > 1
    bands = [partition_bands(r, layout, s, len(runs)) for r, s in zip(runs, suffixes, strict=True)]
    hits = [hit_histogram(r, layout, s, several) for r, s in zip(runs, suffixes, strict=True)]
    return [*bands, *hits]


def _maps(runs: Sequence[Run]) -> list[Figure | None]:
    chosen = [(run, name) for run in runs if run.neurons for name in run.neurons.maps]
    return [
        gradient_maps(run, name, f"-{i + 1}" if i else "", len({r.label for r, _ in chosen}) > 1)
        for i, (run, name) in enumerate(chosen[:MAX_MAPS])
    ]


def _gallery(drawn: Sequence[Figure | None]) -> list[Block]:
    shown = [figure for figure in drawn if figure is not None]
    return [Gallery(shown)] if shown else []
