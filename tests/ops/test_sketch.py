"""The sign fold and what is read off two sketches of a matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradrank.ops.sketch import (
    fold,
    fold_rows,
    prime_at_least,
    random_signs,
    scatter_fold,
    seed_of,
    singular_values_from_sketches,
)
from oracles.sketching import fold_matrix, leading_energy, standard_errors_away


@given(width=st.integers(1, 40), size=st.integers(1, 20), rows=st.integers(1, 5))
def test_fold_is_multiplication_by_the_explicit_matrix(width: int, size: int, rows: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    signs = random_signs(width, size)
    wanted = x.double() @ fold_matrix(signs, size)
    assert fold(x, signs, size).shape == (rows, min(width, size))
    torch.testing.assert_close(fold(x, signs, size).double(), wanted, rtol=1e-5, atol=1e-6)


@given(height=st.integers(1, 40), size=st.integers(1, 20))
def test_fold_rows_is_multiplication_from_the_left(height: int, size: int) -> None:
    x = torch.randn(height, 3, generator=torch.Generator().manual_seed(height)).double()
    signs = random_signs(height, size)
    wanted = fold_matrix(signs, size).T @ x
    torch.testing.assert_close(fold_rows(x, signs, size), wanted)


def test_fold_is_linear() -> None:
    x, y = torch.randn(4, 37), torch.randn(4, 37)
    signs = random_signs(37, 1)
    wanted = 2 * fold(x, signs, 8) - 3 * fold(y, signs, 8)
    torch.testing.assert_close(fold(2 * x - 3 * y, signs, 8), wanted, rtol=1e-5, atol=1e-5)


def test_short_axes_are_kept_exactly() -> None:
    x = torch.randn(4, 8)
    assert torch.equal(fold(x, random_signs(8, 0), 8), x)


@pytest.mark.parametrize("width", [64, 67])
def test_bfloat16_is_accumulated_in_single_precision(width: int) -> None:
    # 2^-9 vanishes beside 1 in bfloat16 (8 bits) and survives in float32.
    x = torch.full((1, width), 2.0**-9, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    signs = torch.ones(width)
    found = fold(x, signs, 1)
    assert found.dtype == torch.float32
    assert float(found) == 1 + (width - 1) * 2.0**-9
    assert float(x.sum(-1, dtype=torch.bfloat16)) != float(found)


def test_signs_are_balanced_seeded_and_leave_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    signs = random_signs(10_000, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(signs, random_signs(10_000, 3))
    assert not torch.equal(signs, random_signs(10_000, 4))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.sum())) < 4 * 100


def test_seeds_are_stable_across_versions_and_tell_their_parts_apart() -> None:
    assert seed_of(0, "in", 32) == 6449081393300029040
    assert seed_of("a", "bc") != seed_of("ab", "c")
    assert 0 <= seed_of("x") < 2**63


def inner_products(x: Tensor, y: Tensor, size: int, seeds: int, twin: str) -> Tensor:
    samples = []
    for seed in range(seeds):
        signs = torch.ones(x.numel()) if twin == "no signs" else random_signs(x.numel(), seed)
        value = float(fold(x, signs, size) @ fold(y, signs, size))
        samples.append(value / size if twin == "divided by k" else value)
    return torch.tensor(samples)[:, None]


@pytest.mark.parametrize("size", [3, 8])
def test_inner_products_are_unbiased(size: int) -> None:
    x, y = torch.randn(50) + 0.3, torch.randn(50) + 0.3
    samples = inner_products(x, y, size, 2000, "")
    assert float(standard_errors_away(samples, (x @ y)[None])) < 4


@pytest.mark.parametrize("twin", ["no signs", "divided by k"])
def test_the_interval_catches_a_broken_sketch(twin: str) -> None:
    x, y = torch.randn(50) + 0.3, torch.randn(50) + 0.3
    samples = inner_products(x, y, 8, 2000, twin)
    assert float(standard_errors_away(samples, (x @ y)[None])) > 10


@given(number=st.integers(-3, 3000))
def test_primes_are_prime_and_nearest(number: int) -> None:
    def prime(candidate: int) -> bool:
        return candidate > 1 and not any(candidate % d == 0 for d in range(2, candidate))

    found = prime_at_least(number)
    assert prime(found)
    assert not any(prime(candidate) for candidate in range(max(number, 0), found))


def test_a_scatter_fold_is_one_signed_bucket_per_coordinate() -> None:
    matrix = scatter_fold(torch.eye(50), 7, 3)
    assert matrix.shape == (50, 7)
    assert (matrix.abs().sum(dim=1) == 1).all()
    assert (matrix.abs().max(dim=1).values == 1).all()
    x = torch.randn(3, 50)
    torch.testing.assert_close(scatter_fold(x, 7, 3), x @ matrix)
    assert not torch.equal(scatter_fold(x, 7, 4), scatter_fold(x, 7, 3))


def test_a_scatter_fold_is_unbiased_exact_when_short_and_seeded_apart() -> None:
    x = torch.randn(2, 50) + 0.3
    state = torch.get_rng_state()
    samples = torch.stack([scatter_fold(x, 8, seed).prod(dim=0).sum() for seed in range(2000)])
    assert torch.equal(torch.get_rng_state(), state)
    assert float(standard_errors_away(samples[:, None], (x[0] @ x[1])[None])) < 4
    assert scatter_fold(x, 50, 0) is x


def sketched(matrix: Tensor, directions: int, seed: int) -> Tensor:
    d_out, d_in = matrix.shape
    in_signs, out_signs = random_signs(d_in, seed), random_signs(d_out, seed + 1)
    y = fold(matrix, in_signs, directions)
    w = fold_rows(matrix, out_signs, 2 * directions + 1).float()
    return singular_values_from_sketches(y, w, out_signs)


@pytest.mark.parametrize(
    "shape", [(60, 90), (90, 60), (60, 5), (5, 60), (10, 90), (90, 10), (4, 4)]
)
@pytest.mark.parametrize("rank", [1, 3])
def test_singular_values_of_low_rank_matrices_are_exact(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    for directions in (rank, 8):
        found = sketched(matrix, directions, 7)
        wanted = torch.linalg.svdvals(matrix.double())
        assert found.shape == (min(directions, *shape),)
        torch.testing.assert_close(found[:rank], wanted[:rank], rtol=1e-4, atol=1e-5)
        assert (found[rank:] < 1e-3 * wanted[0]).all()


@pytest.mark.parametrize("shape", [(7, 90), (90, 7), (7, 7)])
def test_singular_values_are_exact_where_one_side_fits_the_sketch(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    wanted = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(sketched(matrix, 7, 3), wanted, rtol=1e-4, atol=1e-5)


def test_singular_values_of_a_zero_matrix_are_zero() -> None:
    assert not sketched(torch.zeros(30, 40), 6, 0).any()


def decaying(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(120, 60, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(80, 60, generator=generator)).Q
    return left @ torch.diag(0.7 ** torch.arange(60.0)) @ right.T


def test_leading_energies_of_a_decaying_spectrum_are_close() -> None:
    for seed in range(5):
        matrix = decaying(seed)
        found = sketched(matrix, 20, seed)[:8].square()
        torch.testing.assert_close(found, leading_energy(matrix, 8), rtol=0.05, atol=0)


def test_closeness_catches_a_sketch_with_other_signs() -> None:
    matrix = decaying(0)
    y = fold(matrix, random_signs(80, 0), 20)
    w = fold_rows(matrix, random_signs(120, 1), 41).float()
    found = singular_values_from_sketches(y, w, random_signs(120, 2))[:8].square()
    assert ((found / leading_energy(matrix, 8) - 1).abs() > 0.05).any()
