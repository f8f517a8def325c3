"""Truncation is the best there is, its gradients follow, and new rows point where they should."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradrank.ops.lowrank import fresh_rows, strongest, truncate
from oracles import lowrank as oracle


def factors(
    rank: int = 6, d_in: int = 14, d_out: int = 11, seed: int = 0, decay: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Factors in a mixed basis, whose product has a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    A, B, mix = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rank, d_in), (d_out, rank), (rank, rank))
    )
    weights = decay ** torch.arange(rank, dtype=torch.float64)
    return mix @ A, (B * weights) @ torch.linalg.inv(mix)


@given(seed=st.integers(0, 200), rank=st.integers(1, 6), wide=st.booleans())
def test_truncation_is_the_best_approximation(seed: int, rank: int, wide: bool) -> None:
    A, B = factors(seed=seed, d_in=5 if wide else 14, d_out=4 if not wide else 11)
    rank = min(rank, A.shape[1])
    cut = truncate(A, B, rank)
    assert cut.A.shape == (rank, A.shape[1])
    assert cut.B.shape == (B.shape[0], rank)
    size = float((B @ A).norm())
    found = cut.B @ cut.A
    assert float((found - oracle.best_approximation(A, B, rank)).norm()) < 1e-9 * size
    missed = float((found - B @ A).norm())
    assert missed == pytest.approx(oracle.tail(A, B, rank), abs=1e-9 * size)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_oracle_catches_keeping_the_first_components(rank: int) -> None:
    A, B = factors()
    broken = oracle.first_components(A, B, rank)
    best = oracle.best_approximation(A, B, rank)
    assert float((broken - best).norm()) > 0.1 * float(best.norm())
    assert float((broken - B @ A).norm()) > 1.1 * oracle.tail(A, B, rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_widened_once(dtype: torch.dtype) -> None:
    A, B = (factor.to(dtype) for factor in factors())
    cut = truncate(A, B, 3)
    best = oracle.best_approximation(A, B, 3)
    assert cut.A.dtype == torch.float64
    assert float((cut.B @ cut.A - best).norm()) < 1e-9 * float(best.norm())


def test_rows_of_the_new_factor_are_orthogonal_and_of_the_old_size() -> None:
    A, B = factors()
    gram = truncate(A, B, 4).A
    gram = gram @ gram.T
    size = float(A.square().sum()) / A.shape[0]
    torch.testing.assert_close(gram, size * torch.eye(4, dtype=torch.float64))


def gradients(A: Tensor, B: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of a loss of the product, by autograd."""
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    (B @ A * target).sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    return A.grad, B.grad


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_gradients_of_the_new_factors_follow_from_the_old(rank: int, repeated: bool) -> None:
    A, B = factors()
    if repeated:
        A[5] = 2 * A[0] - A[1]  # then A has five directions and no inverse
    target = torch.randn(B.shape[0], A.shape[1], dtype=torch.float64)
    cut = truncate(A, B, rank)
    old, new = gradients(A, B, target), gradients(cut.A, cut.B, target)
    torch.testing.assert_close(cut.to_a @ old[0], new[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(old[1] @ cut.to_b.T, new[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cut.to_b @ A, cut.A, rtol=1e-9, atol=1e-9)
    # Broken twins: the weights' matrices in the place of the gradients'.
    assert not torch.allclose(cut.to_b @ old[0], new[0], rtol=1e-2)
    assert not torch.allclose(old[1] @ cut.to_a.T, new[1], rtol=1e-2)


def test_nearly_equal_rows_do_not_blow_the_moments_up() -> None:
    A = factors()[0].float()
    A[1] = A[0] + 1e-7 * torch.randn(14)
    B = torch.zeros(11, 6)
    assert float(truncate(A, B, 4).to_b.abs().max()) < 100
    blown = truncate(A.double(), B.double(), 4).to_b  # as doubles the difference counts
    assert float(blown.abs().max()) > 1e5


def test_a_zero_update_keeps_the_function_and_gives_usable_rows() -> None:
    A, _ = factors()
    cut = truncate(A, torch.zeros(11, 6, dtype=torch.float64), 3)
    assert not cut.B.any()
    assert int(torch.linalg.matrix_rank(cut.A)) == 3
    torch.testing.assert_close(cut.to_b @ A, cut.A)
    empty = truncate(torch.zeros_like(A), torch.zeros(11, 6, dtype=torch.float64), 3)
    for tensor in (empty.A, empty.B, empty.to_a, empty.to_b):
        assert torch.isfinite(tensor).all()


def test_the_strongest_components_are_kept_in_order() -> None:
    A = torch.diag(torch.tensor([1.0, 5.0, 2.0, 3.0]))
    B = torch.diag(torch.tensor([4.0, 1.0, 2.0, 0.0]))
    assert strongest(A, B, 2) == (0, 1)
    assert strongest(A, B, 3) == (0, 1, 2)
    assert strongest(torch.ones(4, 2), torch.ones(3, 4), 2) == (0, 1)


@given(seed=st.integers(0, 100), count=st.integers(1, 4), sketched=st.booleans())
def test_new_rows_lie_outside_the_span(seed: int, count: int, sketched: bool) -> None:
    A = factors(seed=seed)[0].float()
    state = torch.get_rng_state()
    rows = fresh_rows(A, count, seed, torch.randn(9, 14) if sketched else None)
    if not sketched:
        assert torch.equal(torch.get_rng_state(), state)
    size = float(A.square().sum() / A.shape[0]) ** 0.5
    torch.testing.assert_close(rows.norm(dim=1), torch.full_like(rows[:, 0], size))
    basis = torch.linalg.qr(A.double().T).Q
    assert float((rows @ basis).abs().max()) < 1e-6 * size
    crossed = rows @ rows.T - torch.diag((rows @ rows.T).diag())
    assert float(crossed.abs().max()) < 1e-9 * size**2


def test_random_rows_depend_on_the_seed_alone() -> None:
    A = factors()[0]
    assert torch.equal(fresh_rows(A, 3, 1), fresh_rows(A, 3, 1))
    assert oracle.alignment(fresh_rows(A, 1, 1), fresh_rows(A, 1, 2))[0] < 0.99


@given(seed=st.integers(0, 100), count=st.integers(1, 4))
def test_rows_are_the_principal_directions_of_the_gradient_outside_the_span(
    seed: int, count: int
) -> None:
    A = factors(rank=3, seed=seed)[0].float()
    G, _ = factors(rank=8, seed=seed + 1000, decay=1.0)
    G = torch.linalg.svd(G, full_matrices=False)
    values = 3.0 ** -torch.arange(8, dtype=torch.float64)
    dense = torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64)).Q * values @ G.Vh
    # An orthonormal mixture of rows is a sketch that loses nothing.
    sketch = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q @ dense
    rows = fresh_rows(A, count, 0, sketch.float())
    assert oracle.alignment(rows, oracle.outer_directions(dense, A, count)).min() > 1 - 1e-6
    assert oracle.alignment(rows, oracle.plain_directions(dense, count)).min() < 1 - 1e-3


def test_a_random_sketch_finds_the_leading_directions_of_the_gradient() -> None:
    torch.manual_seed(3)
    A = torch.randn(4, 64)
    core = torch.randn(48, 2, dtype=torch.float64) @ torch.randn(2, 64, dtype=torch.float64)
    G = core + 0.01 * torch.randn(48, 64, dtype=torch.float64)
    sketch = torch.randn(12, 48, dtype=torch.float64) @ G
    rows = fresh_rows(A, 2, 0, sketch.float())
    wanted = oracle.outer_directions(G, A, 2)
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
    # Two directions of the same size: compare the planes they span.
    assert float((unit @ wanted.T).square().sum()) > 2 - 1e-3
    random = fresh_rows(A, 2, 0).double()
    random = random / random.norm(dim=1, keepdim=True)
    assert float((random @ wanted.T).square().sum()) < 0.5


@pytest.mark.parametrize("kind", ["inside", "zero", "one"])
def test_random_rows_fill_up_where_the_sketch_has_no_more(kind: str) -> None:
    A = factors()[0].float()
    sketch = torch.randn(5, 6) @ A
    extra = torch.randn(1, 14)
    if kind == "zero":
        sketch = torch.zeros(5, 14)
    if kind == "one":
        sketch = sketch + torch.randn(5, 1) @ extra
    rows = fresh_rows(A, 3, 7, sketch)
    assert int(torch.linalg.matrix_rank(torch.cat([A.double(), rows.double()]))) == 9
    if kind == "one":
        assert oracle.alignment(rows[:1], oracle.outer_directions(extra, A, 1))[0] > 1 - 1e-6
    else:
        assert torch.equal(rows, fresh_rows(A, 3, 7))


def test_rows_beyond_the_width_are_random() -> None:
    A = torch.randn(4, 5)
    rows = fresh_rows(A, 3, 0, torch.randn(6, 5))
    assert rows.shape == (3, 5)
    assert torch.isfinite(rows).all()
    zero = fresh_rows(torch.zeros(2, 5), 3, 0)
    torch.testing.assert_close(zero.norm(dim=1), torch.full_like(zero[:, 0], 3**-0.5))


def test_autocast_does_not_coarsen_anything() -> None:
    A, B = (factor.float() for factor in factors())
    sketch = torch.randn(5, 14)
    plain = fresh_rows(A, 2, 0, sketch), truncate(A, B, 3).to_b
    with torch.autocast("cpu", torch.bfloat16):
        cast = fresh_rows(A, 2, 0, sketch), truncate(A, B, 3).to_b
    for left, right in zip(plain, cast, strict=True):
        assert torch.equal(left, right)
