"""Partition bands: which output neurons are dominant, by layer and by run."""

from collections.abc import Sequence

from gradrank.core.partition import NeuronPartition
from gradrank.report.bands import Panel, band_panels
from gradrank.report.layout import Layout
from gradrank.report.style import label_of
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import count, listed, percent
from gradrank.report.timemap import evenly
from gradrank.report.view import Run

MAX_TYPES = 12
MAX_LAYERS = 160
MAX_RUNS = 16
# A page stays light: all bands of one kind together have no more cells than this.
_CELLS = 24_000


@look()
def partition_bands(run: Run, layout: Layout, suffix: str = "", among: int = 1) -> Figure | None:
    """Draw a band per target of one run, layers down and module types apart.

    Args:
        run: The run.
        layout: Where each target stands.
        suffix: Ends the figure's name when a page shows several runs.
        among: How many such figures share the page.

    Returns:
        The figure, or None without partitions. ``data``: per module type and layer the ``share``
        of dominant neurons by cell and the number of ``neurons``.

    Source:
        PiLoRA, Figure 3 (there for the last layer only).
    """
    splits = run.splits
    if not splits:
        return None
    columns = sorted({layout.places[name][0] for name in splits})
    kept = [columns[i] for i in evenly(len(columns), MAX_LAYERS)]
    names = _column_names(layout, kept)
    by_type: dict[str, dict[str, NeuronPartition]] = {}
    for name, split in splits.items():
        column = layout.places[name][0]
        if column in names:
            by_type.setdefault(layout.row_of(name), {})[names[column]] = split
    rows = [row for row in layout.rows if row in by_type][:MAX_TYPES]
    panels = [Panel(row, by_type[row]) for row in rows]
    drawn_bands = sum(len(panel.bands) for panel in panels)
    cells = max(24, _CELLS // (max(1, among) * max(1, drawn_bands)))
    tall = float(max(3, min(16, 420 // len(kept))))
    across = min(len(panels), 4)
    drawn, data = band_panels(panels, list(names.values()), "layer", across, cells, tall)
    caption = (
        "One strip per target, its output neurons from left to right; a cell holds neighbours. "
        "Dark stretches are mostly dominant and get the larger rank. Stripes that stand above each "
        "other would mean that layers agree on positions; positions mean something between layers "
        "only where the model adds them up (the outputs that end in the residual stream)."
    )
    caption = "Read like the one above." if suffix else caption
    caption += _left_out(len(by_type) - len(rows), len(columns) - len(kept))
    title = "Dominant neurons by layer" + (f": {label_of(run)}" if among > 1 else "")
    name = f"partition-bands{suffix}"
    return finish(drawn, name, title, caption, data, _headline(run, splits))


@look()
def partitions_compared(
    runs: Sequence[Run], labels: Sequence[str], layout: Layout
) -> Figure | None:
    """Draw the bands of several runs under each other, for the targets of the last layer.

    Args:
        runs: The runs.
        labels: Their labels, distinct.
        layout: Where each target stands.

    Returns:
        The figure, or None with fewer than two runs that split the same target. ``data``: per
        module type and run the ``share`` by cell and the number of ``neurons``.

    Source:
        PiLoRA, Figure 3.
    """
    split = [(label, run.splits) for label, run in zip(labels, runs, strict=True) if run.splits]
    split = split[:MAX_RUNS]
    shared = [name for name in layout.places if sum(name in by for _, by in split) > 1]
    if not shared:
        return None
    numbered = [n for n in shared if layout.columns[layout.places[n][0]][1] is not None]
    last = max(layout.places[name][0] for name in numbered or shared)
    chosen = [name for name in shared if layout.places[name][0] == last][:MAX_TYPES]
    panels = [
        Panel(layout.row_of(name), {label: by[name] for label, by in split if name in by})
        for name in chosen
    ]
    shown = [label for label, _ in split]
    cells = max(24, _CELLS // (len(panels) * len(shown)))
    drawn, data = band_panels(panels, shown, "", 1, cells, 15.0)
    depth = layout.columns[last][1]
    where = (
        "the targets without a layer number"
        if depth is None
        else f"layer {depth}, the last that they share"
    )
    caption = (
        f"The same targets in every run: {where}. Stripes that go through from one run to another "
        "are neurons that both found important; whether that is more than chance is in the overlap "
        "below."
    )
    if sum(1 for run in runs if run.splits) > len(split):
        caption += f" The first {count(MAX_RUNS)} runs are drawn."
    title = "Dominant neurons in different runs"
    return finish(drawn, "partitions-compared", title, caption, data, tall=True)


def _column_names(layout: Layout, columns: Sequence[int]) -> dict[int, str]:
    """Name layers by their numbers; where several stacks share numbers, by stack and number."""
    stacks = {layout.columns[i][0] for i in columns if layout.columns[i][1] is not None}
    leaves = {stack: stack.rpartition(".")[2] for stack in stacks}
    distinct = len(set(leaves.values())) == len(stacks)
    names = {}
    for i in columns:
        stack, depth = layout.columns[i]
        names[i] = "–" if depth is None else str(depth)
        if len(stacks) > 1 and depth is not None:
            names[i] = f"{leaves[stack] if distinct else stack} {depth}"
    return names


def _headline(run: Run, splits: dict[str, NeuronPartition]) -> str:
    rows = sum(split.d_out for split in splits.values())
    dominant = sum(split.dominant_rows for split in splits.values())
    ranks = sorted({split.rank for split in splits.values()})
    lower = sorted({split.supplementary_rank for split in splits.values()})
    return (
        f"{label_of(run)}: {percent(dominant / rows)} of {count(rows)} neurons are dominant and "
        f"get rank {_span(ranks)}, the others {_span(lower)}."
    )


def _span(ranks: Sequence[int]) -> str:
    if len(ranks) > 3:
        return f"{ranks[0]} to {ranks[-1]}"
    return listed(str(rank) for rank in ranks).replace(" and ", " or ")


def _left_out(types: int, layers: int) -> str:
    parts = [f"the first {count(MAX_TYPES)} module types"] if types > 0 else []
    parts += [f"{count(MAX_LAYERS)} layers at even distance"] if layers > 0 else []
    return f" Drawn are {listed(parts)}." if parts else ""
