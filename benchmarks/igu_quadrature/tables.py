"""Tables of the study for its page, each between two comments, so that none is typed by hand."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import fill, markdown

Found = Mapping[str, Any]


def tables(found: Found) -> dict[str, str]:
    """Return every table in Markdown, by name.

    Args:
        found: What :func:`benchmarks.igu_quadrature.results.study` returned.
    """
    makers: dict[str, Callable[[Found], str]] = {
        "setting": _setting,
        "convergence": _convergence,
        "completeness": _completeness,
        "noise": _noise,
        "noise-kinds": _noise_kinds,
        "slopes": _slopes,
        "bias": _bias,
        "cost-directions": lambda f: _cost(f["cost"]["λ"]),
        "cost-elements": lambda f: _cost(f["cost"]["elements"]),
        "split-half": lambda f: _agreement(f["rankings"]["equal_cost"], "halves", True),
        "split-half-looks": lambda f: _agreement(f["rankings"]["equal_looks"], "halves", False),
        "split-half-long": lambda f: _agreement(f["rankings"]["long"], "halves", True),
        "fine-long": lambda f: _agreement(f["rankings"]["long"], "fine mean", False),
        "fine": _fine,
        "removal": _removal,
        "pruned": _pruned,
        "later": _later,
    }
    return {name: make(found) for name, make in makers.items()}


def refresh(page: Path, found: Found) -> None:
    """Write the tables into a page; see :func:`benchmarks.pages.fill`.

    Args:
        page: The page.
        found: What the study found.
    """
    fill(page, tables(found))


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.{digits}g}"


def _correlation(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _setting(found: Found) -> str:
    s, losses = found["settings"], found["losses"]
    rows = [
        ("model, data", f"{s['model']}, {s['task']}"),
        ("adapter", f"rank {s['rank']} on every linear layer, SVD form, scaling {s['scaling']:g}"),
        ("training", f"{s['steps']} steps of AdamW, learning rate {s['lr']:g}"),
        ("mini-batch", f"{s['batch']} sequences of {s['length']} tokens"),
        ("held-out loss", f"{losses['before']:.3f} before, {losses['after']:.3f} after"),
        ("mean λ", _number(losses["size of λ"])),
        ("pool", f"{s['pool']} mini-batches at {s['nodes']} Chebyshev points"),
        ("whole gradients kept", f"of one block of layers in {s['every']}; λ of all targets"),
    ]
    return markdown(("what", "value"), rows)


def _convergence(found: Found) -> str:
    told = found["convergence"]
    counts = [str(n) for n in told["counts"]]
    rows = []
    for part, errors in told["errors"].items():
        slopes = told["slopes"][part]
        rows.append(
            [
                part,
                *(_number(errors[n]) for n in counts),
                *(_interval(slopes[key]) for key in ("all", "from 4")),
                f"{slopes['local'][-1]:.2f}",
                _number(told["rounding"][part]),
            ]
        )
    head = ["", *(f"N = {n}" for n in counts), "slope", "slope, N ≥ 4", "last pair", "rounding"]
    return markdown(head, rows)


def _interval(slope: Mapping[str, Any]) -> str:
    low, high = slope["interval"]
    return f"{slope['slope']:.2f} [{low:.2f}, {high:.2f}]"


def _completeness(found: Found) -> str:
    told = found["convergence"]["completeness"]
    counts = list(told[0]["attributed"])
    rows = []
    for index, entry in enumerate(told, start=1):
        change = entry["change"]
        gaps = [abs(entry["attributed"][n] - change) / abs(change) for n in counts]
        rows.append([str(index), f"{change:.4f}", *(f"{100 * gap:.2g} %" for gap in gaps)])
    return markdown(["mini-batch", "L(ΔW) - L(0)", *(f"N = {n}" for n in counts)], rows)


def _noise(found: Found) -> str:
    rows = []
    for name, c in found["noise"]["λ"].items():
        noise = c["data"] + c["alpha"] + c["both"]
        even = noise / c["bias"] if c["bias"] > 1e-12 else None
        shown = "-" if even is None else "> 10,000" if even > 1e4 else f"{even:,.0f}"
        cells = [_number(c[key]) for key in ("bias", "data", "alpha", "both")]
        rows.append([name, str(c["gradients"]), *cells, shown])
    head = [
        "estimator",
        "gradients",
        "bias²",
        "mini-batches",
        "points, shared",
        "points x mini-batches",
    ]
    return markdown([*head, "M where noise = bias"], rows)


def _noise_kinds(found: Found) -> str:
    """The one-point estimator's components, of every kind of elements."""
    rows = []
    for kind, told in found["noise"].items():
        name = next(name for name in told if name.startswith("unbiased drawn"))
        c = told[name]
        points = c["alpha"] + c["both"]
        shares = (points / (points + c["data"]), c["alpha"] / points)
        cells = [_number(c[key]) for key in ("data", "alpha", "both")]
        rows.append([kind, *cells, *(f"{100 * share:.0f} %" for share in shares)])
    head = ("", "mini-batches", "points, shared", "points x mini-batches")
    return markdown((*head, "share of the points", "of that, shared"), rows)


def _slopes(found: Found) -> str:
    rows = []
    for name, row in found["looks"]["λ"]["estimators"].items():
        other = found["looks"]["elements"]["estimators"][name]
        ends = [_number(errors["errors"][i]) for errors in (row, other) for i in (0, -1)]
        rows.append([name, *ends[:2], _interval(row), *ends[2:], _interval(other)])
    last = found["looks"]["λ"]["looks"][-1]
    head = ["estimator"]
    for part in ("directions", "elements"):
        head += [f"{part}: M = 1", f"M = {last}", "slope"]
    return markdown(head, rows)


def _bias(found: Found) -> str:
    kinds = ("elements", "attributions", "scores")
    rows = [
        [
            str(row["segments"]),
            row["rule"],
            _number(row["sum of weights"]),
            f"{100 * row['share of the ends']:.0f} %",
            _number(row["error"]),
            _number(row["error, scaled"]),
            _number(row["error of directions, scaled"]),
            *(f"{row[f'Spearman of {kind}']:.3f}" for kind in kinds),
        ]
        for row in found["bias"]
    ]
    head = ("N", "rule", "sum of weights", "at the ends", "error", "error, best multiple")
    more = ("the same, directions", "ρ elements", "ρ attributions", "ρ scores")
    return markdown((*head, *more), rows)


def _cost(rows: Sequence[Mapping[str, Any]]) -> str:
    budgets = list(dict.fromkeys(b for row in rows for b in row["budgets"]))
    cells = []
    for row in rows:
        found = [row["budgets"].get(budget) for budget in sorted(budgets, key=int)]
        shown = [
            "-" if c is None else f"{_number(c['measured'], 2)} ({_number(c['predicted'], 2)})"
            for c in found
        ]
        cells.append([row["estimator"], str(row["gradients"]), *shown])
    head = [f"{budget} gradients" for budget in sorted(budgets, key=int)]
    return markdown(["estimator", "per mini-batch", *head], cells)


def _agreement(told: Mapping[str, Any], key: str, ranges: bool) -> str:
    forms = list(next(iter(told.values())))
    rows = []
    for form in forms:
        cells = []
        for name in told:
            c = told[name][form][key]
            text = _correlation(c["mean"])
            if ranges and c["mean"] is not None:
                text += f" [{c['low']:.2f}, {c['high']:.2f}]"
            cells.append(text)
        rows.append([form, *cells])
    return markdown(["score", *told], rows)


def _fine(found: Found) -> str:
    """Agreement with the same form of the fine integral, and of that with other things."""
    told = found["rankings"]
    lam = told["agreement with |λ|"]
    rows = []
    for form, value in lam.items():
        cells = [row[form]["fine"]["mean"] for row in told["equal_cost"].values()]
        rows.append([form, *map(_correlation, cells), _correlation(value)])
    return markdown(["score", *told["equal_cost"], "fine integral with |λ|"], rows)


def _removal(found: Found) -> str:
    told = found["rankings"]["removal"]["whole pool"]
    cost = found["rankings"]["equal_cost"]
    forms = list(next(iter(told.values())))
    rows = []
    for form in forms:
        cells = []
        for name, row in told.items():
            text = _correlation(row[form])
            if name in cost:
                text += f" ({_correlation(cost[name][form]['removal']['mean'])})"
            cells.append(text)
        rows.append([form, *cells])
    return markdown(["score", *told], rows)


def _pruned(found: Found) -> str:
    rows = found["pruned"]
    means = {n: sum(cell["above"] for cell in told) / len(told) for n, told in rows.items()}
    cells = [
        (name, ", ".join(f"{c['above']:.4f} ± {c['error']:.4f}" for c in rows[name]))
        for name in sorted(rows, key=means.__getitem__)
        if name != "nothing removed"
    ]
    return markdown(("ranking", "rise of the held-out loss, nats"), cells)


def _later(found: Found) -> str:
    told = found["later"]
    if told is None:
        return "Not measured."
    counts = list(next(iter(told["errors"].values())))
    rows = [
        [part, *(_number(errors[n]) for n in counts)] for part, errors in told["errors"].items()
    ]
    return markdown(["", *(f"N = {n}" for n in counts)], rows)
