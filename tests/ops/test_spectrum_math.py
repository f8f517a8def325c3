"""Effective, entropy and stable rank, centring and eigenvalues against their slow twins."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradrank.ops.spectrum import (
    centre,
    effective_rank,
    eigenvalues,
    entropy_rank,
    fractional_rank,
    gram_matrix,
    stable_rank,
)
from oracles import spectra as oracle

spectra = st.lists(st.integers(0, 1000), min_size=1, max_size=20)
energies = st.sampled_from([Fraction(k, 20) for k in range(1, 21)])


def descending(values: list[int]) -> torch.Tensor:
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


@given(values=spectra, energy=energies)
def test_effective_rank_equals_exact_arithmetic(values: list[int], energy: Fraction) -> None:
    found = int(effective_rank(descending(values), float(energy)))
    assert found == oracle.effective_rank(values, energy)


@given(values=spectra, energy=energies)
def test_fractional_rank_equals_exact_arithmetic(values: list[int], energy: Fraction) -> None:
    found = float(fractional_rank(descending(values), float(energy)))
    assert found == pytest.approx(float(oracle.fractional_rank(values, energy)), abs=1e-9)
    whole = oracle.effective_rank(values, energy)
    assert whole - 1 < found <= whole or found == whole == 0


def test_the_oracle_catches_a_fraction_of_the_wrong_direction() -> None:
    def of_the_next(values: list[int], energy: Fraction) -> Fraction:
        whole = oracle.effective_rank(values, energy)
        rest = energy * sum(values) - sum(values[: whole - 1])
        return whole - 1 + rest / values[min(whole, len(values) - 1)]

    assert of_the_next([6, 4, 2], Fraction(1, 2)) != oracle.fractional_rank(
        [6, 4, 2], Fraction(1, 2)
    )


@pytest.mark.parametrize("scale", [1.0, 0.1, 1 / 3, 1e-20, 1e20])
@pytest.mark.parametrize("count", [10, 20, 100])
def test_a_flat_spectrum_needs_exactly_its_share(count: int, scale: float) -> None:
    values = torch.full((count,), scale, dtype=torch.float64)
    for tenth in range(1, 11):
        wanted = oracle.effective_rank([1] * count, Fraction(tenth, 10))
        assert int(effective_rank(values, tenth / 10)) == wanted


def test_the_oracle_catches_a_strict_threshold() -> None:
    def strict(values: list[int], energy: Fraction) -> int:
        total, k = sum(values), 0
        while k < len(values) and sum(values[:k]) <= energy * total:
            k += 1
        return k

    assert strict([1] * 10, Fraction(9, 10)) != oracle.effective_rank([1] * 10, Fraction(9, 10))


def test_zero_spectra_have_rank_zero() -> None:
    zero = torch.zeros(2, 5)
    for measure in (effective_rank, fractional_rank, entropy_rank, stable_rank):
        assert measure(zero).tolist() == [0, 0]
    assert not torch.isnan(entropy_rank(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))).any()


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.0001, math.nan])
def test_impossible_thresholds_are_refused(energy: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        effective_rank(torch.ones(3), energy)


@given(values=spectra)
def test_entropy_and_stable_rank_equal_their_formulas(values: list[int]) -> None:
    spectrum = descending(values)
    assert float(entropy_rank(spectrum)) == pytest.approx(oracle.entropy_rank(values), rel=1e-12)
    assert float(stable_rank(spectrum)) == pytest.approx(oracle.stable_rank(values), rel=1e-12)


def test_the_oracle_catches_an_entropy_of_eigenvalues() -> None:
    values = [9.0, 4.0, 1.0]
    shares = [value / sum(values) for value in values]
    twin = math.exp(-sum(p * math.log(p) for p in shares))
    assert abs(twin - oracle.entropy_rank(values)) > 0.1


@given(values=spectra, exponent=st.integers(-30, 30))
def test_ranks_do_not_change_with_the_unit(values: list[int], exponent: int) -> None:
    spectrum = descending(values)
    scaled = spectrum * 2.0**exponent
    assert int(effective_rank(scaled)) == int(effective_rank(spectrum))
    assert float(entropy_rank(scaled)) == pytest.approx(float(entropy_rank(spectrum)), rel=1e-9)
    assert float(stable_rank(scaled)) == pytest.approx(float(stable_rank(spectrum)), rel=1e-9)


@given(values=spectra)
def test_ranks_keep_their_order_and_bounds(values: list[int]) -> None:
    spectrum = descending(values)
    positive = sum(value > 0 for value in values)
    ranks = [int(effective_rank(spectrum, k / 10)) for k in range(1, 11)]
    assert ranks == sorted(ranks)
    assert ranks[-1] <= positive
    assert float(stable_rank(spectrum)) <= positive + 1e-9
    assert float(entropy_rank(spectrum)) <= positive + 1e-9


@pytest.mark.parametrize("shape", [(6, 40), (6, 3), (1, 5)])
def test_eigenvalues_are_squared_singular_values(shape: tuple[int, int]) -> None:
    rows = torch.randn(shape)
    found = eigenvalues(gram_matrix(rows))
    torch.testing.assert_close(found, oracle.eigenvalues(rows), rtol=1e-9, atol=1e-12)
    assert int((found > 0).sum()) == min(shape)


def test_the_oracle_catches_a_gram_without_its_mean() -> None:
    rows = torch.randn(6, 40)
    wrong = eigenvalues(rows.double() @ rows.double().T)
    assert not torch.allclose(wrong, oracle.eigenvalues(rows), rtol=1e-2)


def test_centring_removes_the_mean_gradient() -> None:
    rows = torch.randn(7, 30) + 5
    found = centre(gram_matrix(rows))
    torch.testing.assert_close(found, oracle.centred_gram(rows), rtol=1e-6, atol=1e-5)
    stacked = centre(torch.stack([gram_matrix(rows), gram_matrix(rows * 2)]))
    torch.testing.assert_close(stacked[0], found)
    torch.testing.assert_close(stacked[1], 4 * found)
    assert not torch.allclose(gram_matrix(rows), oracle.centred_gram(rows), rtol=1e-2)


def test_wide_rows_are_summed_in_blocks() -> None:
    rows = torch.randn(2, (1 << 18) + 17)
    wanted = rows.double() @ rows.double().T / 2
    torch.testing.assert_close(gram_matrix(rows), wanted)


def test_batched_eigenvalues_are_those_of_each_matrix() -> None:
    grams = torch.stack([gram_matrix(torch.randn(5, 9)) for _ in range(3)])
    for gram, values in zip(grams, eigenvalues(grams), strict=True):
        torch.testing.assert_close(eigenvalues(gram), values)
