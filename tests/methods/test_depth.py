"""Depth-linear allocation."""

import pytest

import gradrank as gr

TARGETS = [gr.Target(f"h.{i}.q", 8, 8) for i in range(4)]


def test_scores_are_linear_in_depth() -> None:
    scores = gr.Depth(first=1.0, last=4.0).assess(TARGETS, None).scores
    assert scores == pytest.approx({f"h.{i}.q": i + 1.0 for i in range(4)})


def test_ranks_grow_or_fall_with_depth() -> None:
    rising = list(gr.allocate(TARGETS, gr.Depth(1.0, 4.0), 10 * 16).ranks.values())
    falling = list(gr.allocate(TARGETS, gr.Depth(4.0, 1.0), 10 * 16).ranks.values())
    assert rising == [1, 2, 3, 4]
    assert falling == [4, 3, 2, 1]


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(gr.OptionError, match="not both 0"):
        gr.Depth(0.0, 0.0)
