"""What a notebook shows of plans, measurements, records and comparisons: a table and a figure.

Fragments of HTML without scripts, style sheets or addresses, so that they survive what notebooks
strip. Text takes the notebook's own colours, light or dark; a figure lies on white paper.
"""

import hashlib
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradrank.core.plan import Plan
from gradrank.core.planned import PlannedTarget
from gradrank.core.targets import Target
from gradrank.evidence.findings import Comparison
from gradrank.record import RunRecord
from gradrank.report.comparison.figures_contrasts import contrast_figure
from gradrank.report.comparison.strips import method_text
from gradrank.report.comparison.view import View, read_comparison
from gradrank.report.comparison.words import overall
from gradrank.report.figures_training import loss_curves
from gradrank.report.heatmap import Scale, heat_map
from gradrank.report.layout import Layout, arrange
from gradrank.report.reading import read_runs
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import as_float, clean, count, listed, number, percent, plural, seconds

MAX_ROWS = 16
# Twice as many layers as any published model has; beyond, the cells would be hairs.
MAX_LAYERS = 260
_MAX_BYTES = 400_000
_BOX = "overflow-x:auto;max-width:100%;line-height:1.4"
_TABLE = "border-collapse:collapse;margin:.4em 0;font-size:90%"
_EDGE = "padding:.15em .7em;border-bottom:1px solid rgba(128,128,128,.4)"
_PAPER = "background:#fff;border-radius:6px;padding:6px;overflow-x:auto"
_FAINT = "opacity:.75;font-size:85%"

Row = Sequence[tuple[str, bool]]


def plan_html(plan: Plan) -> str:
    """Show a plan: what it spends, ranks by module type, and a map of the ranks.

    Args:
        plan: The plan.

    Returns:
        A fragment of HTML; every text in it is escaped.
    """
    layout = arrange(plan.ranks)
    groups: dict[str, list[PlannedTarget]] = {}
    for planned in plan.targets:
        groups.setdefault(layout.row_of(planned.target.name), []).append(planned)
    rows = []
    whole = plan.parameters
    for kind, members in groups.items():
        ranks, spent = [p.rank for p in members], sum(p.parameters for p in members)
        rows.append(
            (
                _text(kind),
                _number(count(len(members))),
                _number(_span(ranks)),
                _number(number(sum(ranks) / len(ranks), 3)),
                _number(count(spent)),
                _number(percent(spent / whole if whole else 0)),
            )
        )
    heads = ("module type", "targets", "ranks", "mean rank", "parameters", "share")
    return _page(
        f"Plan: {plan.method}, budget {plan.budget}",
        [_sentence(plan), _verdict(plan.reliability)],
        _table(heads, rows),
        _map(plan.ranks, layout, "rank", "Rank of every target", Scale(1, 2, "rank")),
    )


def measurement_html(targets: Sequence[Target], summary: Mapping[str, Any]) -> str:
    """Show a measurement: how it was taken, what it found by module type, and a map of it.

    Args:
        targets: Its targets.
        summary: What ``Measurement.summary`` returns.

    Returns:
        A fragment of HTML; every text in it is escaped.
    """
    found = summary["targets"]
    layout = arrange(target.name for target in targets)
    strength = {target.name: _strength(found[target.name]) for target in targets}
    whole = math.fsum(value for value in strength.values() if value) or 1.0
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(layout.row_of(target.name), []).append(target)
    rows = []
    for kind, members in groups.items():
        ranks = [found[t.name]["effective_rank"] for t in members if _has_rank(found[t.name])]
        shapes = sorted({(t.d_out, t.d_in) for t in members})
        share = math.fsum(strength[t.name] or 0.0 for t in members) / whole
        rows.append(
            (
                _text(kind),
                _number(count(len(members))),
                _number(f"{shapes[0][0]} × {shapes[0][1]}" + (", …" if shapes[1:] else "")),
                _number(_span(ranks)),
                _number(number(sum(ranks) / len(ranks), 3) if ranks else number(None)),
                _number(percent(share)),
            )
        )
    heads = ("module type", "targets", "d_out × d_in", "effective ranks", "mean", "energy")
    return _page(
        "Measurement", _taken(summary), _table(heads, rows), _measured(found, layout, strength)
    )


def record_html(record: RunRecord) -> str:
    """Show a run: what it was, its metrics and cost, and its losses.

    Args:
        record: The record.

    Returns:
        A fragment of HTML; every text in it is escaped.
    """
    metrics = [(key, number(as_float(value))) for key, value in record.metrics.items()]
    counts = record.trainable_parameters
    facts = [(f"adapter parameters ({key})", count(as_float(n))) for key, n in counts.items()]
    spent = [
        (key.removesuffix("_seconds") + " time", seconds(as_float(value)))
        for key, value in record.cost.items()
        if key.endswith("_seconds")
    ]
    rows = [(_text(key), _number(value)) for key, value in (*metrics, *facts, *spent)]
    model, status = record.config.get("model"), record.status
    lines = [f"{record.kind}, {status}" + (f", on {model}" if model else "")]
    return _page(
        f"Run: {record.name}", lines, _table(("", ""), rows), loss_curves(read_runs([record]))
    )


def comparison_html(comparison: Comparison) -> str:
    """Show a comparison: its verdict, its cells, and the differences of the first task.

    Args:
        comparison: The comparison.

    Returns:
        A fragment of HTML; every text in it is escaped.
    """
    view = read_comparison(comparison)
    rows = [
        (
            _text(row.task),
            _text(row.budget),
            _text(method_text(view, row.method)),
            _number(view.value(row.task, row.cell.mean)),
            _number("" if row.difference is None else view.change(row.task, row.difference)),
            _text(str(row.verdict)),
        )
        for row in view.rows
    ]
    heads = ("task", "budget", "method", "mean", f"against {view.reference}", "evidence")
    lines = [overall(view), _scope(view)]
    figure = contrast_figure(view, view.tasks[0], 0) if view.tasks else None
    return _page(f"Comparison: {comparison.name}", lines, _table(heads, rows), figure)


def _scope(view: View) -> str:
    failed = len(view.source.failures)
    told = f"{plural(len(view.tasks), 'task')}, {plural(len(view.budgets), 'budget')}"
    return told + (f"; {plural(failed, 'run')} failed" if failed else "")


def _sentence(plan: Plan) -> str:
    used = sum(1 for rank in plan.ranks.values() if rank)
    split = f", {plural(len(plan.partitions), 'neuron partition')}" if plan.partitions else ""
    return (
        f"{count(plan.parameters)} of {count(plan.budget_parameters)} parameters on {used} of "
        f"{plural(len(plan.targets), 'target')}{split}"
    )


def _verdict(told: Mapping[str, Any] | None) -> str:
    if not told or not told.get("recommendation"):
        return "reliability: this method looks at no data"
    return f"reliability: {told['recommendation']}. {told.get('reason', '')}"


def _taken(summary: Mapping[str, Any]) -> list[str]:
    """Say how a measurement was taken, as far as it tells."""
    number_of = int(summary.get("batches") or 0)
    parts = [f"{count(number_of)} mini-batch{'' if number_of == 1 else 'es'}"]
    parts += [f"{count(n)} {key}" for key in ("examples", "tokens") if (n := summary.get(key))]
    estimator = summary.get("estimator")
    if estimator:
        parts.append(f"estimator {estimator}")
    name = summary.get("model_name") or summary.get("model")
    unreached = summary.get("unreached") or []
    lines = [f"{', '.join(parts)}{f'; model {name}' if name else ''}"]
    if unreached:
        more = f" and {len(unreached) - 3} more" if len(unreached) > 3 else ""
        lines.append(f"no gradient reached {listed(map(str, unreached[:3]))}{more}")
    return lines


def _has_rank(row: Mapping[str, Any]) -> bool:
    return row.get("effective_rank") is not None


def _strength(row: Mapping[str, Any]) -> float | None:
    """Return the energy of a target: of its mini-batch gradients, or of their mean."""
    if row.get("energy") is not None:
        return float(row["energy"])
    singular = row.get("singular_values")
    return math.fsum(value**2 for value in singular) if singular is not None else None


def _measured(
    found: Mapping[str, Mapping[str, Any]],
    layout: Layout,
    strength: Mapping[str, float | None],
) -> Figure | None:
    ranks = {name: row["effective_rank"] for name, row in found.items() if _has_rank(row)}
    if ranks:
        scale = Scale(1, 2, "effective rank")
        return _map(ranks, layout, "effective-rank", "Effective rank of every target", scale)
    logs = {name: math.log10(value) for name, value in strength.items() if value}
    scale = Scale(0, 1, "energy of the mean gradient", log=True, numbers=False)
    return _map(logs, layout, "energy", "Energy of every target's mean gradient", scale)


@look()
def _map(
    values: Mapping[str, float], layout: Layout, name: str, title: str, like: Scale
) -> Figure | None:
    if not values or len(layout.columns) > MAX_LAYERS:
        return None
    low = min(values.values()) if like.log else like.low
    high = max(*values.values(), low + 1)
    scale = Scale(low, high, like.label, log=like.log, numbers=like.numbers)
    panels = {title: {key: float(value) for key, value in values.items()}}
    drawn, data = heat_map(panels, layout, scale)
    return finish(drawn, name, title, "", data)


def _page(title: str, lines: Iterable[str], table: str, figure: Figure | None) -> str:
    shown = "".join(f"<div>{_escape(line, 600)}</div>" for line in lines if line)
    drawn = ""
    if figure is not None and len(figure.svg) <= _MAX_BYTES:
        drawn = f'<div style="{_PAPER};max-width:{figure.width}px">{_own_ids(figure)}</div>'
    head = f"<div><strong>{_escape(title, 160)}</strong></div>"
    return f'<div style="{_BOX}">{head}{shown}{table}{drawn}</div>'


def _own_ids(figure: Figure) -> str:
    """Return the figure with ids that no other output of the same notebook has."""
    digest = hashlib.sha256(figure.svg.encode("utf-8", "replace")).hexdigest()[:10]
    return re.sub(rf'(?<=[#"]){re.escape(figure.name)}-(?=\d)', f"g{digest}-", figure.svg)


def _table(heads: Sequence[str], rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    titles = "".join(
        f'<th style="{_EDGE};text-align:{_side(cell)}">{_escape(head)}</th>'
        for head, cell in zip(heads, rows[0], strict=True)
    )
    top = f"<thead><tr>{titles}</tr></thead>" if any(heads) else ""
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="{_EDGE};text-align:{_side(cell)}">{_shown(cell)}</td>' for cell in row
        )
        + "</tr>"
        for row in rows[:MAX_ROWS]
    )
    left = len(rows) - MAX_ROWS
    more = f'<div style="{_FAINT}">and {plural(left, "row")} more</div>' if left > 0 else ""
    return f'<table style="{_TABLE}">{top}<tbody>{body}</tbody></table>{more}'


def _shown(cell: tuple[str, bool]) -> str:
    # Numbers are made here and may hold no-break spaces, which cleaning would refuse.
    return html.escape(cell[0]) if cell[1] else _escape(cell[0])


def _side(cell: tuple[str, bool]) -> str:
    return "right" if cell[1] else "left"


def _text(text: str) -> tuple[str, bool]:
    return text, False


def _number(text: str) -> tuple[str, bool]:
    return text, True


def _span(ranks: Sequence[int]) -> str:
    if not ranks:
        return number(None)
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}–{high}"


def _escape(text: Any, limit: int = 80) -> str:
    return html.escape(clean(text, limit))
