"""Random allocation."""

import gradrank as gr

TARGETS = [gr.Target(f"h.{i}.q", 16, 16) for i in range(12)]


def test_seeds_differ_and_names_decide() -> None:
    plans = [gr.allocate(TARGETS, gr.RandomScores(seed=s), "uniform:4") for s in (0, 1, 0)]
    assert plans[0].ranks != plans[1].ranks
    assert plans[0] == plans[2]
    fewer = gr.RandomScores().assess(TARGETS[3:6], None).scores
    whole = gr.RandomScores().assess(TARGETS, None).scores
    assert fewer == {name: whole[name] for name in fewer}


def test_scores_are_exponential() -> None:
    many = [gr.Target(f"h.{i}", 4, 4) for i in range(4000)]
    scores = sorted(gr.RandomScores().assess(many, None).scores.values())
    # Mean 1 and median log 2, within 4 standard errors of 1 / sqrt(4000).
    assert abs(sum(scores) / 4000 - 1) < 4 / 4000**0.5
    assert abs(scores[2000] - 0.6931) < 4 / 4000**0.5
