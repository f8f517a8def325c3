"""Row factors: energies of any set of rows, from two sketches, against dense matrices."""

import pytest
import torch
from torch import Tensor

from gradrank.ops.rows import by_energy, row_energies, row_factors, split_energies
from gradrank.ops.sketch import fold, fold_rows, random_signs, singular_values_from_sketches


def low_rank(m: int, n: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, n, generator=generator, dtype=torch.float64)


def sketched(g: Tensor, k: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    m, n = g.shape
    signs = random_signs(m, 1)
    return fold(g.float(), random_signs(n, 2), k), fold_rows(g, signs, c).float(), signs


@pytest.mark.parametrize(("m", "n", "rank"), [(90, 70, 5), (7, 60, 5), (60, 5, 5), (3, 4, 2)])
def test_factors_hold_the_rows_when_the_sketch_holds_the_rank(m: int, n: int, rank: int) -> None:
    g = low_rank(m, n, rank)
    factors = row_factors(*sketched(g, 11, 23))
    assert factors.shape == (m, min(11, m, n))
    assert factors.dtype == torch.float32
    gram = g @ g.T
    torch.testing.assert_close(
        factors.double() @ factors.double().T, gram, rtol=1e-3, atol=1e-4 * float(gram.max())
    )


@pytest.mark.parametrize("rank", [4, 40])
def test_factors_and_singular_values_tell_the_same_energies(rank: int) -> None:
    """Also where the matrix has more directions than the sketch, so that both are estimates."""
    sketches = sketched(low_rank(80, 90, rank), 11, 23)
    found = torch.linalg.svdvals(row_factors(*sketches).double())
    torch.testing.assert_close(
        found, singular_values_from_sketches(*sketches), rtol=1e-4, atol=1e-5 * float(found[0])
    )


def test_groups_have_the_energies_of_their_rows() -> None:
    factors = low_rank(50, 6, 6, seed=3)
    factors[7] *= 100
    order = by_energy(factors)
    cuts = [1, 4, 17, 49]
    for cut, (upper, lower) in zip(cuts, split_energies(factors, order, cuts), strict=True):
        first, rest = factors[order[:cut]], factors[order[cut:]]
        for found, rows in ((upper, first), (lower, rest)):
            wanted = torch.linalg.svdvals(rows).square()
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11 * float(wanted[0]))


def test_a_small_rest_is_not_lost_beside_a_giant_row() -> None:
    factors = low_rank(20, 4, 4, seed=4)
    factors[3] *= 1e9
    ((_, lower),) = split_energies(factors, by_energy(factors), [1])
    rest = torch.cat([factors[:3], factors[4:]])
    torch.testing.assert_close(lower, torch.linalg.svdvals(rest).square(), rtol=1e-9, atol=0)


def test_a_whole_less_the_first_group_would_lose_it() -> None:
    factors = low_rank(20, 4, 4, seed=4)
    factors[3] *= 1e9
    broken = factors.mT @ factors - factors[3:4].mT @ factors[3:4]
    rest = torch.cat([factors[:3], factors[4:]])
    wrong = torch.linalg.eigvalsh(broken).flip(-1)
    assert (wrong - torch.linalg.svdvals(rest).square()).abs().max() > 1


def test_rows_are_ordered_by_energy_and_the_first_of_equals_leads() -> None:
    factors = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    assert row_energies(factors).tolist() == [1.0, 25.0, 1.0, 0.0]
    assert by_energy(factors).tolist() == [1, 0, 2, 3]
