"""Neuron partitions as words: numbers, masks, costs, plain data, and their place in a plan."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradrank as gr
from gradrank.core.partition import NeuronPartition

MASKS = st.lists(st.booleans(), min_size=1, max_size=70)


def counted(mask: list[bool], d_in: int, rank: int, rest: int) -> int:
    """The trained numbers of both groups, one by one; a group without rows or rank has none."""
    total = 0
    for group, r in ((True, rank), (False, rest)):
        rows = sum(1 for flag in mask if flag is group)
        if rows and r:
            total += sum(1 for _ in range(r) for _ in range(d_in))
            total += sum(1 for _ in range(rows) for _ in range(r))
    return total


@settings(deadline=None, derandomize=True, max_examples=80)
@given(MASKS, st.integers(1, 5), st.integers(0, 5), st.integers(1, 9))
def test_masks_and_parameters_are_counted_right(
    mask: list[bool], rank: int, rest: int, d_in: int
) -> None:
    split = NeuronPartition.of(mask, rank, rest)
    assert split.mask == mask
    assert split.dominant_rows == sum(mask)
    assert split.is_split == (0 < sum(mask) < len(mask))
    assert split.parameters(d_in) == counted(mask, d_in, rank, rest)
    assert split.lora_rank == (rank if any(mask) else 0) + (0 if all(mask) else rest)
    assert NeuronPartition.from_dict(split.to_dict()) == split


def test_the_count_catches_a_group_that_pays_without_rows() -> None:
    whole = NeuronPartition.of([True] * 4, 2, 1)
    printed = 2 * (3 + 4) + 1 * (3 + 4 - 4)
    assert whole.parameters(3) == counted([True] * 4, 3, 2, 1) == 14 != printed


def test_the_formula_of_the_paper_holds_where_both_groups_have_rows() -> None:
    n, m, dominant, r, rest = 4096, 11008, 4679, 32, 2
    split = NeuronPartition.of([i < dominant for i in range(m)], r, rest)
    assert split.parameters(n) == r * (n + dominant) + rest * (n + m - dominant)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"d_out": 0}, "d_out 0"),
        ({"rank": 0}, "rank 0"),
        ({"rank": True}, "rank True"),
        ({"supplementary_rank": -1}, "supplementary_rank -1"),
        ({"dominant": "1f"}, "names row 4"),
        ({"dominant": "-3"}, "bits -3"),
        ({"dominant": "xyz"}, "no hexadecimal number: 'xyz'"),
        ({"dominant": 7}, "must be a hexadecimal text"),
        ({"dominant": "f" * (1 << 23)}, "must be a hexadecimal text"),
        ({"d_out": 1 << 40}, "16,777,216 are the most"),
    ],
)
def test_what_a_file_may_hold_is_checked(change: dict[str, Any], what: str) -> None:
    data = NeuronPartition.of([True, False, True, False], 2, 1).to_dict() | change
    with pytest.raises(gr.PlanError, match=what.replace("(", r"\(")):
        NeuronPartition.from_dict(data)


def test_a_missing_field_and_another_type_are_named() -> None:
    data = NeuronPartition.of([True, False], 2, 1).to_dict()
    del data["rank"]
    with pytest.raises(gr.PlanError, match="lacks 'rank'"):
        NeuronPartition.from_dict(data)
    with pytest.raises(gr.PlanError, match="not a list"):
        NeuronPartition.from_dict([1])


def plan(*planned: gr.PlannedTarget) -> gr.Plan:
    return gr.Plan("hybrid", {}, gr.Budget.parameters(500), 500, planned)


def test_a_plan_keeps_a_partition_and_counts_it() -> None:
    split = NeuronPartition.of([True, False, False, True], 3, 1)
    made = plan(
        gr.PlannedTarget.of(gr.Target("a", 6, 4), split, 0.5),
        gr.PlannedTarget.of(gr.Target("b", 6, 4), NeuronPartition.of([True] * 4, 3, 1)),
        gr.PlannedTarget.of(gr.Target("c", 6, 4), 2),
    )
    assert made.ranks == {"a": 4, "b": 3, "c": 2}
    assert made.partitions == {"a": split}
    assert made.parameters == split.parameters(6) + 3 * 10 + 2 * 10
    again = gr.Plan.from_dict(made.to_dict())
    assert again == made
    assert made.diff(again) == {}
    other = NeuronPartition.of([False, True, False, True], 3, 1)
    moved = plan(gr.PlannedTarget.of(gr.Target("a", 6, 4), other), *made.targets[1:])
    assert made.diff(moved) == {"a": (4, 4)}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rank": 3}, "needs the LoRA rank|needs 4|its partition needs"),
        ({"partition": {"d_out": 5}}, "4 output rows"),
        ({"partition": {"dominant": "f"}}, "two groups"),
        ({"rank": 9, "partition": {"rank": 8}}, r"above min\(d_in, d_out\) = 4"),
    ],
)
def test_a_partition_edited_by_hand_must_fit_its_target(change: dict[str, Any], what: str) -> None:
    split = NeuronPartition.of([True, False, False, True], 3, 1)
    data = plan(gr.PlannedTarget.of(gr.Target("a", 6, 4), split)).to_dict()
    entry = data["targets"]["a"]
    entry |= {k: entry[k] | v if isinstance(v, dict) else v for k, v in change.items()}
    with pytest.raises(gr.PlanError, match=what):
        gr.Plan.from_dict(data)
