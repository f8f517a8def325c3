"""Plans and adapters as tables for a terminal. File contents are shown as text, never as markup."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from gradrank.core.partition import NeuronPartition
from gradrank.core.plan import Plan
from gradrank.core.targets import Target
from gradrank.record import RunRecord
from gradrank.report.text import clean


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1
) -> Table:
    """Return a table.

    Args:
        title: Its title.
        columns: Headings.
        rows: Cells.
        left: How many leading columns are text; the rest are numbers, aligned to the right.

    Returns:
        The table.
    """
    made = Table(title=clean(title) or None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(Text(clean(column)), justify="left" if index < left else "right")
    for row in rows:
        made.add_row(*(Text(clean(cell, 2000)) for cell in row))
    return made


def by_type(
    targets: Sequence[Target],
    ranks: Mapping[str, int],
    partitions: Mapping[str, NeuronPartition] | None = None,
) -> Table:
    """Return ranks and parameters by type of module.

    Args:
        targets: The targets.
        ranks: Rank per target.
        partitions: Neuron partition per target, of those that have one.

    Returns:
        The table.
    """
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.module_type, []).append(target)
    split = partitions or {}
    costs = {
        t.name: split[t.name].parameters(t.d_in) if t.name in split else ranks[t.name] * t.cost
        for t in targets
    }
    total = sum(costs.values()) or 1
    rows = []
    for kind, members in groups.items():
        held = [ranks[t.name] for t in members]
        spent = sum(costs[t.name] for t in members)
        parted = [sum(t.name in split for t in members) or ""] if split else []
        rows.append(
            (
                kind,
                len(members),
                min(held),
                f"{statistics.fmean(held):.1f}",
                max(held),
                sum(1 for rank in held if not rank) or "",
                *parted,
                f"{spent:,}",
                f"{spent / total:.0%}",
            )
        )
    heads = (
        "module type",
        "targets",
        "least rank",
        "mean",
        "most",
        "dropped",
        *(["split"] if split else []),
        "parameters",
        "share",
    )
    return table("", heads, rows)


def rank_maps(
    targets: Sequence[Target],
    ranks: Mapping[str, int],
    partitions: Mapping[str, NeuronPartition] | None = None,
) -> list[Table]:
    """Return one table layer x module type of ranks per stack of layers.

    Args:
        targets: The targets.
        ranks: Rank per target.
        partitions: Neuron partition per target, of those that have one.

    Returns:
        The tables; rank 0 is a dot, a module that a layer lacks is blank, and a partition is
        written ``16|2``: rank 16 for dominant rows, rank 2 for the others.
    """
    split = partitions or {}
    cells = {t.name: _rank(ranks[t.name], split.get(t.name)) for t in targets}
    return maps("ranks", targets, cells)


def maps(what: str, targets: Sequence[Target], cells: Mapping[str, str]) -> list[Table]:
    """Return one table layer x module type per stack of layers.

    Args:
        what: What the cells say.
        targets: The targets.
        cells: Text per target.

    Returns:
        The tables; a module that a layer lacks is blank.
    """
    stacks: dict[str, dict[int | None, dict[str, str]]] = {}
    for target in targets:
        rows = stacks.setdefault(target.stack, {})
        rows.setdefault(target.depth, {})[_within_layer(target)] = cells[target.name]
    made = []
    for stack, rows in stacks.items():
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        short = _short_names(columns)
        lines = [
            ["-" if depth is None else depth, *(row.get(name, "") for name in columns)]
            for depth, row in rows.items()
        ]
        made.append(table(f"{what} in {stack or 'the model'}", ["layer", *short], lines, left=0))
    return made


def partition_table(plan: Plan) -> list[Table]:
    """Return the neuron partitions of a plan, one line each.

    Args:
        plan: The plan.

    Returns:
        The table; nothing if the plan has no partition.
    """
    rows = [
        (
            planned.target.name,
            split_words(planned.partition),
            f"{planned.parameters:,}",
        )
        for planned in plan.targets
        if planned.partition is not None
    ]
    heads = ("target", "ranks x output rows", "parameters")
    return [table("neuron partitions", heads, rows, left=2)] if rows else []


def split_words(partition: NeuronPartition) -> str:
    """Return a partition in words, with sizes that add up to its rows.

    Args:
        partition: The partition.

    Returns:
        For example ``"16 x 192 rows + 2 x 384"``; rows without an adapter are said so.
    """
    rows = partition.dominant_rows
    rest, lower = partition.d_out - rows, partition.supplementary_rank
    others = f"{lower} x {rest:,}" if lower else f"none on {rest:,}"
    return f"{partition.rank} x {rows:,} rows + {others}"


def plan_lines(plan: Plan) -> list[str]:
    """Return what a plan spends and whether its scores can be trusted, as lines.

    Args:
        plan: The plan.

    Returns:
        The lines.
    """
    used = sum(1 for rank in plan.ranks.values() if rank)
    lines = [
        f"{plan.parameters:,} of {plan.budget_parameters:,} adapter parameters "
        f"(budget {plan.budget}, {plan.slack:,} left) on {used} of {len(plan.ranks)} targets"
    ]
    if plan.partitions:
        held = sum(planned.parameters for planned in plan.targets if planned.partition is not None)
        lines.append(
            f"partitions: {len(plan.partitions)} targets split their output rows, on "
            f"{held / plan.parameters:.0%} of the parameters"
        )
    told = plan.reliability or {}
    if told.get("recommendation"):
        verdict = clean(told["recommendation"])
        lines.append(f"reliability: {verdict} - {clean(told.get('reason', ''), 600)}")
    else:
        lines.append(f"reliability: method '{clean(plan.method)}' looks at no data")
    saturation = told.get("saturation")
    if isinstance(saturation, int | float):
        lines.append(f"saturation: the effective rank is {saturation:.0%} of what M batches allow")
    return lines


def run_lines(record: RunRecord) -> list[str]:
    """Return what a training run gave and cost, as lines.

    Args:
        record: Its record.

    Returns:
        The lines.
    """
    cost, metrics = record.cost, record.metrics
    counts = record.trainable_parameters
    other = counts.get("other")
    more = f" and {other:,} of the task head" if other else ""
    lines = [f"trained {counts.get('final', 0):,} adapter parameters{more}"]
    if record.decisions:
        lines.append(_capacity_line(record, counts))
    if metrics:
        lines.append(
            "evaluation: "
            + ", ".join(f"{clean(k)} {v:.4f}" for k, v in metrics.items() if v is not None)
        )
    spent = [
        f"{name} {cost[key]:.1f} s"
        for name, key in (
            ("measuring", "measure_seconds"),
            ("training", "train_seconds"),
            ("evaluating", "eval_seconds"),
        )
        if cost.get(key)
    ]
    lines.append(f"time: {', '.join(spent)}")
    return lines


def _rank(rank: int, partition: NeuronPartition | None) -> str:
    if partition is not None:
        return f"{partition.rank}|{partition.supplementary_rank}"
    return str(rank) if rank else "·"


def _within_layer(target: Target) -> str:
    parts = target.name.split(".")
    start = next((i for i, part in enumerate(parts) if part.isdigit()), -1) + 1
    return ".".join(parts[start:])


def _short_names(names: Sequence[str]) -> list[str]:
    """Return the shortest endings, in whole parts, that tell the names apart."""
    short = []
    for name in names:
        parts = name.split(".")
        endings = (".".join(parts[-size:]) for size in range(1, len(parts) + 1))
        unique = (e for e in endings if sum(o == e or o.endswith("." + e) for o in names) == 1)
        short.append(next(unique, name))
    return short


def _capacity_line(record: RunRecord, counts: Mapping[str, Any]) -> str:
    """What a dynamic method did: moved capacity about, or took it away."""
    moved = sum(int(decision.get("moved") or 0) for decision in record.decisions)
    peak, times = counts.get("peak", 0), len(record.decisions)
    if not moved and counts.get("final", 0) < peak:
        return (
            f"capacity: pruned from {peak:,} to {counts['final']:,} adapter parameters in {times} "
            "decisions"
        )
    return (
        f"capacity: {moved:,} parameters moved in {times} decisions, never more than "
        f"{peak:,} in use"
    )
