import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradrank.core.errors import DataError
from gradrank.evidence.bootstrap import Spread, pooled, resampled, spread
from gradrank.evidence.items import read_items
from gradrank.evidence.significance import holm, verdict
from oracles import evidence as slow

PARTS = st.just(0.0) | st.floats(1e-6, 10)


def tokens(values):
    return read_items({"kind": "tokens", "nll": list(values), "count": [1] * len(values)})


def of_losses(ours, theirs, resamples=400):
    """The library's way from runs to a spread of the difference."""
    runs = [tokens(row) for row in (*ours, *theirs)]
    replicates = resampled("eval_loss", runs, resamples, 0)
    k = len(ours)
    values = np.mean(ours, axis=1) - np.mean(theirs, axis=1)
    return spread(values, replicates[:, :k] - replicates[:, k:], len(ours[0])), replicates


def draw(rng, seeds=4, items=30, by_seed=0.2, by_item=0.5, by_both=0.3, effect=0.0):
    hard = 3 * rng.random(items)
    own, luck = by_item * rng.standard_normal(items), by_seed * rng.standard_normal((seeds, 1))
    noise = by_both * rng.standard_normal((2, seeds, items))
    return 3 + hard + own + luck + effect + noise[0], 3 + hard + noise[1]


def index_of(resamples, n):
    """The resamples that `resampled` draws, by what each item alone is worth."""
    ones = [tokens(row) for row in np.eye(n)]
    return np.rint(resampled("eval_loss", ones, resamples, 0) * n).astype(int)


def test_items_are_resampled_alike_for_all_runs_as_the_slow_twin_does():
    ours, theirs = draw(np.random.default_rng(0))
    counts = index_of(50, 30)
    assert (counts.sum(axis=1) == 30).all()
    index = [np.repeat(np.arange(30), row).tolist() for row in counts]
    found, replicates = of_losses(ours, theirs, 50)
    wanted = slow.paired_replicates(index, ours.tolist(), theirs.tolist())
    assert replicates[:, :4] - replicates[:, 4:] == pytest.approx(np.array(wanted))
    assert found.items == pytest.approx(slow.item_variance(wanted, 30))
    # The broken twin, which pairs no items, is far off: the items' own difficulty does not cancel.
    broken = slow.unpaired_replicates(index, ours.tolist(), theirs.tolist())
    assert slow.item_variance(broken, 30) > 2 * found.items


def test_without_item_variance_it_is_the_paired_t_test():
    rng = np.random.default_rng(1)
    ours, theirs = draw(rng, by_item=0.0, by_both=0.0, by_seed=0.3)
    found, _ = of_losses(ours, theirs)
    test = stats.ttest_rel(ours.mean(axis=1), theirs.mean(axis=1))
    assert found.p_value() == pytest.approx(test.pvalue, rel=1e-6)
    interval = test.confidence_interval()
    assert found.interval() == pytest.approx((interval.low, interval.high), rel=1e-6)


def test_without_seed_variance_it_is_the_paired_bootstrap_over_items():
    rng = np.random.default_rng(2)
    ours, theirs = draw(rng, items=200, by_seed=0.0, by_both=0.0)
    found, _ = of_losses(ours, theirs, 4000)
    reference = stats.ttest_rel(ours[0], theirs[0]).confidence_interval()
    assert found.interval() == pytest.approx((reference.low, reference.high), rel=0.05)


def test_the_resamples_of_a_run_do_not_depend_on_the_others_and_are_seeded():
    ours, theirs = draw(np.random.default_rng(3))
    runs = [tokens(row) for row in (*ours, *theirs)]
    whole = resampled("eval_loss", runs, 60, 5, "task")
    assert resampled("eval_loss", runs[3:4], 60, 5, "task")[:, 0] == pytest.approx(whole[:, 3])
    assert (resampled("eval_loss", runs, 60, 5, "task") == whole).all()
    assert (resampled("eval_loss", runs, 60, 6, "task") != whole).any()
    assert (resampled("eval_loss", runs, 60, 5, "other") != whole).any()


def test_large_splits_are_resampled_in_parts(monkeypatch):
    runs = [tokens(row) for row in draw(np.random.default_rng(3))[0]]
    whole = resampled("eval_loss", runs, 50, 0)
    monkeypatch.setattr("gradrank.evidence.bootstrap._CHUNK", 200)
    assert resampled("eval_loss", runs, 50, 0) == pytest.approx(whole)


@given(PARTS, PARTS, PARTS, st.floats(-20, 20), st.integers(1, 9))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_test_and_interval_never_disagree(seeds, items, floor, value, freedom):
    found = Spread(value, seeds, freedom, items, 100, floor)
    if found.constant:
        return
    p = found.p_value()
    assert 0 < p <= 1
    if abs(p - 0.05) > 1e-6:
        low, high = found.interval()
        assert (p < 0.05) == (low > 0 or high < 0)
    if 1e-12 < p < 0.99:
        assert found.half_width(p) == pytest.approx(abs(value), rel=1e-6)


def test_the_interval_does_not_close_when_few_seeds_agree_by_chance():
    rng = np.random.default_rng(4)
    replicates = rng.standard_normal((500, 2))
    found = spread(np.array([0.5, 0.5]), replicates - replicates.mean(axis=0), 100)
    assert found.seeds == 0
    assert found.half_width() > 1.9 * np.sqrt(0.5) * 0.9


def test_equal_runs_have_no_difference():
    found = spread(np.zeros(3), np.zeros((10, 3)), 20)
    assert found.constant
    assert found.p_value() == 1.0
    assert found.interval() == (0.0, 0.0)


def test_a_huge_effect_has_a_p_value_above_zero():
    assert Spread(1e6, 1e-6, 9, 0.0, 100, 0.0).p_value() == 1e-15


def test_one_seed_has_no_spread():
    with pytest.raises(DataError, match="found 1 seeds"):
        spread(np.zeros(1), np.zeros((10, 1)), 5)


def test_more_seeds_and_more_items_narrow_the_interval():
    def width(seeds, items):
        rng = np.random.default_rng(5)
        found = [of_losses(*draw(rng, seeds, items), 200)[0].half_width() for _ in range(20)]
        return np.mean(found)

    assert width(8, 100) < width(3, 100)
    assert width(5, 200) < width(5, 20)


def test_pooling_scales_and_sums():
    one = Spread(1.0, 0.04, 4, 0.01, 99, 0.02)
    two = Spread(30.0, 4.0, 2, 9.0, 49, 5.0)
    found = pooled([one, two], [0.5, 10.0])
    assert found.value == pytest.approx((1 / 0.5 + 30 / 10) / 2)
    assert found.seeds == pytest.approx((0.04 / 0.25 + 4 / 100) / 4)
    assert found.items == pytest.approx((0.01 / 0.25 + 9 / 100) / 4)
    welch = (0.16 + 0.04) ** 2 / (0.16**2 / 4 + 0.04**2 / 2)
    assert found.seed_freedom == pytest.approx(welch)
    assert pooled([one], [1.0]) == one


def test_holm_by_a_known_example_and_the_definition():
    # Five hypotheses; the third step stops the procedure at 0.05.
    assert holm([0.01, 0.013, 0.014, 0.19, 0.35]) == pytest.approx([0.05, 0.052, 0.052, 0.38, 0.38])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.04, 0.2, 0.5, 1.0]), max_size=7))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_holm_equals_the_slow_twin(p_values):
    assert holm(p_values) == pytest.approx(slow.holm(p_values))
    assert all(found >= p for found, p in zip(holm(p_values), p_values, strict=True))


def test_the_slow_twin_of_holm_catches_benjamini_and_hochberg():
    p_values = [0.01, 0.02, 0.03, 0.04]
    wrong = stats.false_discovery_control(p_values)
    assert slow.holm(p_values) != pytest.approx(wrong)


def test_verdicts_need_both_the_test_and_the_interval():
    assert verdict(1.0, 0.5, 1.5, 0.01) == "better"
    assert verdict(-1.0, -1.5, -0.5, 0.01) == "worse"
    assert verdict(1.0, 0.5, 1.5, 0.05) == "no evidence"
    assert verdict(1.0, -0.5, 1.5, 0.01) == "no evidence"


def test_a_sign_flip_test_of_five_seeds_never_finds_anything():
    def mean(values, axis):
        return np.mean(values, axis=axis)

    test = stats.permutation_test(
        (np.array([5.0, 6.0, 7.0, 8.0, 9.0]),), mean, permutation_type="samples"
    )
    assert test.pvalue == 2 / 32
