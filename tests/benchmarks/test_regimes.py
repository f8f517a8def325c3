"""What the study of regimes derives from one measurement, against measuring and by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.regimes.measure import QUICK
from benchmarks.regimes.views import (
    View,
    correlation,
    crossed,
    explain,
    joined,
    kind_of,
    mean,
    seen,
    variation,
    views,
    within_shapes,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gradrank.core.errors import OptionError
from gradrank.core.targets import Target
from gradrank.lab.compare.bench import Bench, Loaded
from gradrank.ops.spectrum import eigenvalues, gram_matrix
from gradrank.session import measure
from gradrank.signals.measure import Spectrum
from gradrank.signals.measurement import Measurement

BLOCKS = [
    Target(f"layer.{depth}.{kind}", 4, out)
    for depth in range(4)
    for kind, out in (("q", 4), ("k", 4), ("up", 8))
]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    # Blocks of equal length: every mini-batch counts equally many items.
    return Bench(tmp_path_factory.mktemp("bench")).load(QUICK[2].config(), "test", 0)


def measured(fresh: Loaded, count: int, size: int, accumulate: int = 1) -> Measurement:
    batches = fresh.batches(count * accumulate, size, 0)
    return measure(
        fresh.loaded.model,
        batches,
        Spectrum("dense"),
        num_batches=count,
        accumulate=accumulate,
        seed=0,
    )


@pytest.mark.parametrize("batches", [4, 6, 8])
def test_fewer_batches_are_the_corner_of_the_gram_matrix(fresh: Loaded, batches: int) -> None:
    whole, few = measured(fresh, 8, 2), measured(fresh, batches, 2)
    part = seen(whole, View(batches))
    for target in whole.targets:
        got = eigenvalues(part.gram(target.name))
        wanted = eigenvalues(few.gram(target.name))
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6 * float(wanted[0]))


@pytest.mark.parametrize(("batches", "group"), [(4, 2), (2, 4), (3, 2)])
def test_joined_batches_are_batches_of_more_examples(
    fresh: Loaded, batches: int, group: int
) -> None:
    whole, large = measured(fresh, 8, 2), measured(fresh, batches, 2, accumulate=group)
    part = seen(whole, View(batches, group))
    assert part.batches == batches
    for target in whole.targets:
        got, wanted = part.gram(target.name), large.gram(target.name)
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-5 * float(wanted.diag().max()))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 1000))
def test_joined_is_the_gram_matrix_of_averaged_gradients(
    batches: int, group: int, spare: int, seed: int
) -> None:
    rows = torch.randn(batches * group + spare, 7, generator=torch.Generator().manual_seed(seed))
    averaged = rows[: batches * group].reshape(batches, group, 7).mean(1)
    got = joined(gram_matrix(rows), View(batches, group))
    assert torch.allclose(got, gram_matrix(averaged), rtol=1e-5, atol=1e-6)


def test_a_view_of_more_than_there_is_is_refused() -> None:
    with pytest.raises(OptionError, match="need 8 measured ones; there are 6"):
        joined(torch.eye(6, dtype=torch.float64), View(4, 2))


def test_views_fit_the_measurement_and_keep_four_batches() -> None:
    assert views(32)[0] == View(32)
    assert set(views(32)) == {
        View(32), View(16), View(8), View(4), View(8, 2), View(8, 4), View(16, 2)
    }  # fmt: skip
    assert set(views(8)) == {View(8), View(4), View(4, 2)}
    for many in (4, 8, 16, 20, 32):
        assert all(v.batches >= 4 and v.batches * v.group <= many for v in views(many))


def by_hand(values: list[float]) -> tuple[float, float, np.ndarray]:
    """R², adjusted R² and residuals with dummies against a constant, as a textbook has them."""
    rows = [
        [1.0, float(t.name.endswith(".k")), float(t.name.endswith(".up")), float(t.depth or 0)]
        for t in BLOCKS
    ]
    X, y = np.array(rows), np.array(values)
    beta = np.linalg.lstsq(X, y, rcond=None)[0]
    left = ((y - X @ beta) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    n, slopes = len(y), 3
    return 1 - left, 1 - left * (n - 1) / (n - slopes - 1), y - X @ beta


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_is_that_of_least_squares_by_hand(seed: int) -> None:
    values = np.random.default_rng(seed).gamma(2.0, size=len(BLOCKS)).tolist()
    fit, (explained, adjusted, residuals) = explain(BLOCKS, values), by_hand(values)
    assert fit.explained == pytest.approx(explained)
    assert fit.adjusted == pytest.approx(adjusted)
    assert np.allclose(fit.residuals, residuals)


def test_the_fit_explains_types_and_depth_and_nothing_else() -> None:
    base = {"q": 1.0, "k": 5.0, "up": 2.0}
    exact = [base[t.module_type] + 0.5 * (t.depth or 0) for t in BLOCKS]
    assert explain(BLOCKS, exact).explained == pytest.approx(1)
    curved = [float(((t.depth or 0) - 1.5) ** 2) for t in BLOCKS]
    assert explain(BLOCKS, curved).explained == pytest.approx(0, abs=1e-12)
    flat = explain(BLOCKS, [3.0] * len(BLOCKS))
    assert flat.explained is None
    assert not flat.residuals.any()


def test_noise_is_explained_by_chance_and_the_adjusted_share_says_so() -> None:
    rng = np.random.default_rng(0)
    fits = [explain(BLOCKS, rng.normal(size=len(BLOCKS)).tolist()) for _ in range(400)]
    assert mean([fit.explained for fit in fits]) == pytest.approx(3 / 11, abs=0.03)
    assert mean([fit.adjusted for fit in fits]) == pytest.approx(0, abs=0.04)


def test_a_target_outside_of_all_blocks_takes_no_part_in_the_slope() -> None:
    values = [float(t.depth or 0) for t in BLOCKS]
    more = [*BLOCKS, Target("pooler.dense", 4, 4)]
    fit = explain(more, [*values, 1000.0])
    assert fit.explained == pytest.approx(1)
    assert np.allclose(fit.residuals, 0)


def test_kinds_tell_modules_of_one_last_name_apart() -> None:
    names = ("encoder.layer.1.attention.output.dense", "encoder.layer.1.output.dense")
    first, second = (kind_of(Target(name, 4, 4)) for name in names)
    assert first != second
    assert kind_of(Target("encoder.layer.11.output.dense", 4, 4)) == second
    assert kind_of(Target("pooler.dense", 4, 4)) == "pooler.dense"


def test_agreement_within_shapes_sees_no_difference_between_shapes() -> None:
    rng = np.random.default_rng(1)
    first, second = (rng.normal(size=len(BLOCKS)) for _ in range(2))
    large = np.array([100.0 * (t.d_out == 8) for t in BLOCKS])
    small, big = np.array([t.d_out == 4 for t in BLOCKS]), large > 0
    parts = [stats.spearmanr(first[part], second[part]) for part in (small, big)]
    wanted = (8 * parts[0].statistic + 4 * parts[1].statistic) / 12  # pyright: ignore
    got = within_shapes(BLOCKS, (first + large).tolist(), (second + large).tolist())
    assert got == pytest.approx(wanted)
    assert within_shapes(BLOCKS[:2], [1.0, 2.0], [1.0, 2.0]) is None


def test_small_arithmetic() -> None:
    values = [1.0, 2.0, 6.0]
    assert variation(values) == pytest.approx(np.std(values) / 3)
    assert mean([1.0, None, math.nan, 3.0]) == 2
    assert mean([None]) is None
    a, b = np.array([1.0, 2.0, 4.0]), np.array([3.0, 1.0, 2.0])
    assert correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert correlation(a, np.ones(3)) is None
    assert set(crossed({0: "", 1: ""}, {0: "", 2: ""})) == {(0, 2), (1, 0), (1, 2)}


def test_the_whole_view_keeps_the_mean_gradient(fresh: Loaded, tmp_path: Path) -> None:
    found = replace(measured(fresh, 4, 2), info={"kept": True})
    assert seen(found, View(4)) is found
    assert seen(found, View(2)).info == {"kept": True}
