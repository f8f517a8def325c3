"""Figures of the study of path integrals: quadrature, noise, bias, cost and rankings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from gradrank.report.style import Mark, type_marks
from gradrank.report.svg import Figure, canvas, finish, look

Found = Mapping[str, Any]
_WIDTH = 900
_GREY = "#8a8a8a"
_PARTS = ("P", "Q", "λ")


def study_figures(found: Found) -> list[Figure]:
    """Draw every figure of a study.

    Args:
        found: What ``python -m benchmarks.study_igu`` found.

    Returns:
        The figures, in the order of the page.
    """
    makers: Sequence[Callable[[Found], Figure]] = (
        convergence,
        noise,
        over_looks,
        bias,
        at_cost,
        reliability,
        pruned,
    )
    return [make(found) for make in makers]


@look()
def convergence(found: Found) -> Figure:
    """Draw the trapezoid rule's error over N, and the loss along the path.

    Args:
        found: The study.

    Returns:
        The figure; ``data``: ``counts``, ``errors``, ``rounding``, ``losses``.
    """
    told = found["convergence"]
    drawn = canvas(_WIDTH, 380)
    left, right = drawn.subplots(1, 2, width_ratios=(1.25, 1))
    marks = type_marks(_PARTS)
    counts = told["counts"]
    for part in _PARTS:
        _line(left, counts, [told["errors"][part][str(n)] for n in counts], marks[part], part)
    first = max(told["errors"][part][str(counts[-1])] for part in _PARTS)
    guide = [first * (counts[-1] / n) ** 2 for n in counts]
    left.plot(counts, guide, color=_GREY, linewidth=1.2, linestyle="--", label="slope -2")
    floor = max(told["rounding"].values())
    left.axhline(floor, color=_GREY, linewidth=1.2, linestyle=":", label="rounding of float32")
    _logarithmic(left, counts)
    left.set(xlabel="segments N", ylabel="relative error", title="Trapezoid rule")
    left.legend(loc="upper right")
    points, losses = told["losses"]
    right.plot(points, losses, color="#0072B2", marker="o", markersize=3.5)
    right.set(xlabel="α", ylabel="loss of one mini-batch, nats", title="Loss along the path")
    drawn.tight_layout()
    caption = (
        "Left: error against a Gauss-Legendre rule, of w times the integral, in the norm over all "
        "elements of a kind. Right: why few segments do badly."
    )
    data = {key: told[key] for key in ("counts", "errors", "rounding", "losses")}
    return finish(drawn, "igu-convergence", "Error of the trapezoid rule over N", caption, data)


@look()
def noise(found: Found) -> Figure:
    """Draw where one look's squared error comes from, by estimator.

    Args:
        found: The study.

    Returns:
        The figure; ``data``: components by estimator, of directions.
    """
    told = found["noise"]["λ"]
    kinds = (
        ("bias", "bias"),
        ("data", "mini-batches"),
        ("alpha", "points, shared"),
        ("both", "points x mini-batches"),
    )
    marks = type_marks([label for _, label in kinds])
    drawn = canvas(_WIDTH, 70 + 32 * len(told))
    ax = drawn.subplots()
    names = list(told)[::-1]
    places, start = range(len(names)), [0.0] * len(names)
    for key, label in kinds:
        widths = [told[name][key] for name in names]
        mark = marks[label]
        ax.barh(
            places,
            widths,
            left=start,
            color=mark.color,
            hatch=mark.hatch,
            label=label,
            height=0.7,
            edgecolor="white",
            linewidth=0.4,
        )
        start = [a + b for a, b in zip(start, widths, strict=True)]
    ax.set_yticks(places, [f"{name} ({told[name]['gradients']})" for name in names])
    ax.set(xlabel="squared error of one look / squared size of the integral (directions)")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4)
    drawn.tight_layout()
    caption = "Gradients per look in brackets. Bias is what no number of looks removes."
    return finish(drawn, "igu-noise", "Where the error of one look comes from", caption, told)


@look()
def over_looks(found: Found) -> Figure:
    """Draw measured errors over M.

    Args:
        found: The study.

    Returns:
        The figure; ``data``: the errors.
    """
    told = found["looks"]
    drawn = canvas(_WIDTH, 400)
    axes = drawn.subplots(1, 2, sharey=True)
    marks = type_marks(list(told["λ"]["estimators"]))
    titles = {"λ": "directions (λ of all targets)", "elements": "elements of P, Q, λ"}
    for ax, (part, title) in zip(axes, titles.items(), strict=True):
        looks = told[part]["looks"]
        for name, row in told[part]["estimators"].items():
            _line(ax, looks, row["errors"], marks[name], name)
        first = told[part]["estimators"]["grid N=4"]["errors"][0]
        guide = [first / m**0.5 for m in looks]
        ax.plot(looks, guide, color=_GREY, linewidth=1.2, linestyle="--", label="slope -1/2")
        _logarithmic(ax, looks)
        ax.set(xlabel="mini-batches M", title=title)
    axes[0].set_ylabel("relative error")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="lower center", ncols=3)
    drawn.tight_layout(rect=(0, 0.2, 1, 1))
    caption = (
        "Against the fine integral over the whole pool, mini-batches drawn with replacement. "
        "Curves that flatten have a bias."
    )
    return finish(drawn, "igu-error-over-looks", "Error over the mini-batches M", caption, told)


@look()
def bias(found: Found) -> Figure:
    """Draw what is left of the printed weights' bias after the best scaling.

    Args:
        found: The study.

    Returns:
        The figure; ``data``: rows by N and rule.
    """
    rows = found["bias"]
    drawn = canvas(_WIDTH, 340)
    axes = drawn.subplots(1, 2)
    marks = type_marks(["stochastic", "unbiased"])
    for ax, key, title in (
        (axes[0], "error, scaled", "error of the best multiple"),
        (axes[1], "share of the ends", "share of the weight on α = 0 and 1"),
    ):
        for rule, mark in marks.items():
            chosen = [row for row in rows if row["rule"] == rule]
            _line(ax, [r["segments"] for r in chosen], [r[key] for r in chosen], mark, rule)
        _logarithmic(ax, [row["segments"] for row in rows if row["rule"] == "unbiased"])
        ax.set(xlabel="segments N", title=title)
    axes[0].legend(loc="lower left")
    drawn.tight_layout()
    caption = "Expectations over all draws, over the whole pool, of w times the integral."
    return finish(drawn, "igu-bias", "Bias of the weights as printed", caption, {"rows": rows})


@look()
def at_cost(found: Found) -> Figure:
    """Draw the error that a number of gradients buys: predicted lines, measured marks.

    Args:
        found: The study.

    Returns:
        The figure; ``data``: rows by estimator.
    """
    drawn = canvas(_WIDTH, 430)
    axes = drawn.subplots(1, 2, sharey=True)
    marks = type_marks([row["estimator"] for row in found["cost"]["λ"]])
    for ax, (part, title) in zip(
        axes, {"λ": "directions", "elements": "elements"}.items(), strict=True
    ):
        for row in found["cost"][part]:
            mark, budgets = marks[row["estimator"]], [int(b) for b in row["budgets"]]
            cells = list(row["budgets"].values())
            ax.plot(
                budgets,
                [c["predicted"] for c in cells],
                color=mark.color,
                linestyle=mark.line,
                linewidth=1.3,
            )
            ax.plot(
                budgets,
                [c["measured"] for c in cells],
                color=mark.color,
                marker=mark.marker,
                linestyle="",
                markersize=6,
                label=row["estimator"],
            )
        _logarithmic(ax, sorted({int(b) for row in found["cost"][part] for b in row["budgets"]}))
        ax.set(xlabel="gradients in all", title=title)
    axes[0].set_ylabel("relative error")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="lower center", ncols=4)
    drawn.tight_layout(rect=(0, 0.2, 1, 1))
    caption = "Lines: predicted by the analysis of variance. Marks: measured over repetitions."
    data = {part: found["cost"][part] for part in ("λ", "elements")}
    return finish(drawn, "igu-error-at-cost", "Error at equal cost", caption, data)


@look()
def reliability(found: Found) -> Figure:
    """Draw split-half agreement by form of the score and estimator, at equal cost.

    Args:
        found: The study.

    Returns:
        The figure; ``data``: agreements of halves.
    """
    told = found["rankings"]["equal_cost"]
    estimators = list(told)
    forms = list(told[estimators[0]])
    marks = type_marks(estimators)
    drawn = canvas(_WIDTH, 130 + 64 * len(forms))
    ax = drawn.subplots()
    for number, name in enumerate(estimators):
        shift = (number - (len(estimators) - 1) / 2) * 0.11
        cells = [told[name][form]["halves"] for form in forms]
        kept = [(i + shift, c) for i, c in enumerate(cells) if c["mean"] is not None]
        mark = marks[name]
        ax.hlines(
            [y for y, _ in kept],
            [c["low"] for _, c in kept],
            [c["high"] for _, c in kept],
            color=mark.color,
            linewidth=1.6,
        )
        ax.plot(
            [c["mean"] for _, c in kept],
            [y for y, _ in kept],
            linestyle="",
            color=mark.color,
            marker=mark.marker,
            markersize=6,
            label=name,
        )
    for number in range(1, len(forms)):
        ax.axhline(number - 0.5, color="#cccccc", linewidth=0.8)
    ax.set_yticks(range(len(forms)), forms)
    ax.set_ylim(len(forms) - 0.45, -0.55)
    ax.grid(axis="y", visible=False)
    gradients = found["rankings"]["gradients"]
    ax.set(xlabel=f"Spearman's correlation of two halves, {gradients} gradients each")
    drawn.legend(loc="lower center", ncols=4)
    drawn.tight_layout(rect=(0, 75 / (130 + 64 * len(forms)), 1, 1))
    caption = "Mean and 5th to 95th percentile over random splits; |λ| is the same in both halves."
    data = {n: {f: told[n][f]["halves"] for f in forms} for n in estimators}
    return finish(drawn, "igu-split-half", "How steady rankings of directions are", caption, data)


@look()
def pruned(found: Found) -> Figure:
    """Draw held-out losses with a quarter of the parameters left, by various rankings.

    Args:
        found: The study.

    Returns:
        The figure; ``data``: losses by ranking.
    """
    left_out = {"all stored removed", "nothing removed"}
    rows = {
        name: [cell["above"] for cell in told]
        for name, told in found["pruned"].items()
        if name not in left_out
    }
    order = sorted(rows, key=lambda name: sum(rows[name]) / len(rows[name]))
    drawn = canvas(_WIDTH, 60 + 25 * len(order))
    ax = drawn.subplots()
    for place, name in enumerate(order):
        told = rows[name]
        plain = name in {"random", "|λ|"}
        color = _GREY if plain else "#D55E00" if name.startswith("fine") else "#0072B2"
        marker = "D" if plain else "s" if name.startswith("fine") else "o"
        ax.plot(told, [place] * len(told), linestyle="", marker=marker, color=color, markersize=6)
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.set(xlabel="rise of the held-out loss, nats, with a quarter of the stored parameters left")
    drawn.tight_layout()
    caption = "Circles: from half of the pool at equal cost. Squares: fine integral, whole pool."
    return finish(drawn, "igu-pruned", "What rankings are worth", caption, rows)


def _line(ax: Axes, x: Sequence[float], y: Sequence[float], mark: Mark, label: str) -> None:
    ax.plot(
        x, y, color=mark.color, marker=mark.marker, linestyle=mark.line, markersize=5, label=label
    )


def _logarithmic(ax: Axes, at: Sequence[int]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(list(at), [str(n) for n in at])
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = ax.get_ylim()
    # Over less than two decades, powers of ten alone would be one or two ticks.
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
