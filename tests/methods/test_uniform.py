"""Uniform LoRA."""

import gradrank as gr

TARGETS = [gr.Target(f"h.{i}.q", 8, 8) for i in range(5)]


def test_a_uniform_budget_gives_that_rank_everywhere() -> None:
    plan = gr.allocate(TARGETS, "uniform", "uniform:3")
    assert set(plan.ranks.values()) == {3}
    assert plan.slack == 0
    assert set(plan.scores.values()) == {1.0}
    assert plan.reliability is None


def test_a_remainder_is_spread_as_single_ranks() -> None:
    plan = gr.allocate(TARGETS, "uniform", 5 * 3 * 16 + 2 * 16)
    assert sorted(plan.ranks.values()) == [3, 3, 3, 4, 4]


def test_small_targets_stop_at_their_largest_rank() -> None:
    targets = [gr.Target("big", 8, 8), gr.Target("small", 8, 2)]
    plan = gr.allocate(targets, "uniform", 5 * 16 + 2 * 10)
    assert plan.ranks == {"big": 5, "small": 2}
