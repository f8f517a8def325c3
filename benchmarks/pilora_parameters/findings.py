"""The parameter table of PiLoRA, reproduced: all that its study page shows, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.pilora_parameters.parameters import (
    PRINTED,
    Choice,
    Printed,
    gives,
    implied_share,
    lora_parameters,
    percent,
    pilora_parameters,
    printed_ratios,
    readings,
    share_by_ratio,
    stated_ratios,
)
from benchmarks.pilora_parameters.shapes import Shape, build_shapes

from gradrank.core.targets import Target

SCHEMA = "gradrank.study/pilora-parameters/1"
Span = tuple[float, float, float]
# Ranks that RoBERTa-large's figures might have been computed with, r and r'.
_OTHER_RANKS = ((8, 1), (16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (64, 8))


def study() -> dict[str, Any]:
    """Return what the study finds.

    Returns:
        Plain data: per model its shape, the readings that give LoRA's printed figure, and the
        shares of dominant neurons that follow.
    """
    shapes = build_shapes()
    found = {one.model: _model(one, shapes[one.model]) for one in PRINTED}
    return {"schema": SCHEMA, "models": found, "joint": _joint(shapes)}


def _model(one: Printed, shape: Shape) -> dict[str, Any]:
    all_readings = list(readings(shape, one.rank))
    fitting = [choice for choice in all_readings if gives(choice.percent or 0.0, one.lora)]
    targets = shape.of_types(one.types or shape.types)
    return {
        "printed": asdict(one),
        "types": {kind: _size(shape.of_types((kind,))) for kind in shape.types},
        "bases": dict(shape.bases),
        "head": shape.head,
        "readings": len(all_readings),
        "largest": max(choice.percent or 0.0 for choice in all_readings),
        "named": [_reading(one, shape, c) for c in all_readings if _is_named(one, shape, c)],
        "fitting": [_reading(one, shape, choice) for choice in fitting],
        "by_ratio": _by_ratio(one, targets, (one.rank, one.supplementary_rank), one.rank),
        "other_ranks": [] if fitting else _other_ranks(one, shape),
    }


def _size(targets: Sequence[Target]) -> dict[str, int]:
    first = targets[0]
    return {"count": len(targets), "d_in": first.d_in, "d_out": first.d_out}


def _is_named(one: Printed, shape: Shape, choice: Choice) -> bool:
    """The targets that the paper's settings can be read as, or all where it names none."""
    return choice.types == (one.types or shape.types) and not choice.head


def _reading(one: Printed, shape: Shape, choice: Choice) -> dict[str, Any]:
    targets, size = shape.of_types(choice.types), shape.bases[choice.basis]
    ranks = one.rank, one.supplementary_rank
    share = implied_share(shape, choice, ranks, one.pilora)
    halves = pilora_parameters(targets, *ranks, 0.5)
    return {
        "types": list(choice.types),
        "basis": choice.basis,
        "inside": choice.inside,
        "head": choice.head,
        "lora": choice.percent,
        "fits": gives(choice.percent or 0.0, one.lora),
        "dora": _with_magnitudes(shape, choice, one.rank),
        "halves": percent(round(halves), size, choice.inside),
        "share": share,
    }


def _with_magnitudes(shape: Shape, choice: Choice, rank: int) -> float:
    """Return DoRA's percentage: one magnitude per output neuron beside LoRA's factors."""
    targets = shape.of_types(choice.types)
    counted = lora_parameters(targets, rank) + sum(target.d_out for target in targets)
    return percent(counted, shape.bases[choice.basis], choice.inside)


def _by_ratio(
    one: Printed, targets: Sequence[Target], ranks: tuple[int, int], rank: int
) -> dict[str, Span]:
    return {
        "outside": share_by_ratio(targets, ranks, printed_ratios(one, inside=False), rank),
        "inside": share_by_ratio(targets, ranks, printed_ratios(one, inside=True), rank),
        "stated": share_by_ratio(targets, ranks, stated_ratios(one), rank),
    }


def _other_ranks(one: Printed, shape: Shape) -> list[dict[str, Any]]:
    """What ranks other than the printed ones would give, on all types."""
    rows = []
    for rank, lower in _OTHER_RANKS:
        fitting = [c for c in readings(shape, rank) if gives(c.percent or 0.0, one.lora)]
        whole = [c for c in fitting if c.types == shape.types and not c.head]
        rows.append(
            {
                "rank": rank,
                "supplementary_rank": lower,
                "fitting": [_plain(choice) for choice in fitting],
                "dora": _with_magnitudes(shape, whole[0], rank) if whole else None,
                "share": implied_share(shape, whole[0], (rank, lower), one.pilora)
                if whole
                else None,
                "by_ratio": _by_ratio(one, shape.targets, (rank, lower), rank),
            }
        )
    return rows


def _joint(shapes: Mapping[str, Shape]) -> list[dict[str, Any]]:
    """Readings that give every figure of Tables 1 and 4 of both language models at once."""
    rows = []
    two = [(one, shapes[one.model]) for one in PRINTED[:2]]
    for first in readings(two[0][1], two[0][0].rank):
        choices = [
            Choice(first.types, first.basis, first.inside, False, _lora(one, shape, first))
            for one, shape in two
        ]
        found = [_reading(one, shape, c) for (one, shape), c in zip(two, choices, strict=True)]
        low, high = found
        holds = {
            "lora of both": low["fits"] and high["fits"],
            "dora": gives(high["dora"], two[1][0].dora or 0.0),
            "halves": gives(low["halves"], two[0][0].halves or 0.0),
        }
        if holds["lora of both"]:
            names = ("types", "basis", "inside")
            figures = {"lora": [low["lora"], high["lora"]], "dora": high["dora"]}
            shares = {"halves": low["halves"], "shares": [low["share"], high["share"]]}
            kept = {name: low[name] for name in names}
            rows.append({**kept, "holds": holds, **figures, **shares})
    return rows


def _lora(one: Printed, shape: Shape, choice: Choice) -> float:
    adapter = lora_parameters(shape.of_types(choice.types), one.rank)
    return percent(adapter, shape.bases[choice.basis], choice.inside)


def _plain(choice: Choice) -> dict[str, Any]:
    return {**asdict(choice), "types": list(choice.types)}
