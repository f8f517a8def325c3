"""Selection is bitwise, rotation exact, and appended components begin tamed."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from gradrank.ops.blockwise import dequantise_blocks, quantise_blocks
from gradrank.ops.moments import (
    Carry,
    Role,
    carry_centred,
    carry_factored,
    carry_tensor,
)
from oracles.moments import (
    adam_step_length,
    carried_by_loops,
    codes_by_loops,
    factored_estimate,
    momentum_of,
    second_moment_of,
    selection_matrix,
)

ROLES: list[Role] = ["weight", "first", "second", "magnitude"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(rand(size, size, seed=seed)).Q


@st.composite
def selections(draw: st.DrawFn) -> tuple[int, list[int], int, int]:
    rank = draw(st.integers(1, 7))
    indices = draw(st.lists(st.integers(0, rank - 1), unique=True, max_size=rank))
    fresh, blank = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    assume(len(indices) + fresh + blank)
    return rank, indices, fresh, blank


@given(case=selections(), axis=st.integers(0, 2), role=st.sampled_from(ROLES))
def test_selection_is_bitwise_and_appends_behind(
    case: tuple[int, list[int], int, int], axis: int, role: Role
) -> None:
    rank, indices, fresh, blank = case
    shape = [3, 2, 4]
    shape[axis] = rank
    tensor = rand(*shape, seed=rank).float()
    carry = Carry.select(indices, fresh, blank)
    found = carry_tensor(tensor, carry, axis, role)
    parts = found.split([len(indices), fresh, blank], dim=axis)
    assert found.shape[axis] == carry.size == len(indices) + fresh + blank
    assert torch.equal(parts[0], tensor.index_select(axis, torch.tensor(indices).long()))
    assert not parts[2].any()
    if role in {"weight", "first"} or not indices:
        assert not parts[1].any()
    else:
        mean = parts[0].double().mean(axis, keepdim=True)
        torch.testing.assert_close(parts[1].double(), mean.expand_as(parts[1]), rtol=1e-6, atol=0)


@given(
    rank=st.integers(1, 6),
    size=st.integers(1, 6),
    fresh=st.integers(0, 2),
    blank=st.integers(0, 2),
    axis=st.integers(0, 1),
    second=st.booleans(),
)
def test_rotation_equals_the_loops(
    rank: int, size: int, fresh: int, blank: int, axis: int, second: bool
) -> None:
    matrix = rand(size, rank, seed=size)
    tensor = rand(*((rank, 5) if axis == 0 else (5, rank)), seed=rank)
    tensor = tensor.abs() if second else tensor
    carry = Carry.rotate(matrix, fresh, blank)
    found = carry_tensor(tensor, carry, axis, "second" if second else "first")
    wanted = carried_by_loops(tensor, matrix, axis=axis, fresh=fresh, blank=blank, squared=second)
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_loops_catch_broken_twins() -> None:
    matrix, moments = rand(3, 4), rand(4, 5).abs()
    wanted = carried_by_loops(moments, matrix, fresh=1, blank=1, squared=True)
    right = carry_tensor(moments, Carry.rotate(matrix, 1, 1), 0, "second")
    torch.testing.assert_close(right, wanted)
    seed = right[:3].mean(0, keepdim=True)
    zero = torch.zeros_like(seed)
    broken = {
        "not squared": carry_tensor(moments, Carry.rotate(matrix, 1, 1), 0, "first"),
        "absolute values": torch.cat([matrix.abs() @ moments, seed, zero]),
        "fresh begins at zero": torch.cat([right[:3], zero, zero]),
        "blank before fresh": torch.cat([right[:3], zero, seed]),
    }
    for name, twin in broken.items():
        assert not torch.allclose(twin, wanted), name


@pytest.mark.parametrize("axis", [0, 1])
def test_rotated_momentum_is_that_of_a_run_in_the_new_basis(axis: int) -> None:
    # A' = R_A A and B' = B R_B: the gradients at the new factors, from dW, and their momentum.
    rank, d_in, d_out = 4, 6, 5
    change_a, change_b = rand(rank, rank, seed=1), rand(rank, rank, seed=2)
    A, B = rand(rank, d_in, seed=3), rand(d_out, rank, seed=4)
    weights = [rand(d_out, d_in, seed=10 + t) for t in range(6)]
    if axis == 0:
        old = [B.T @ G for G in weights]
        new = [(B @ change_b).T @ G for G in weights]
        carry = Carry.rotate(change_b.T)
    else:
        old = [G @ A.T for G in weights]
        new = [G @ (change_a @ A).T for G in weights]
        carry = Carry.rotate(change_a)
    wanted = momentum_of(new, 0.9)
    found = carry_tensor(momentum_of(old, 0.9), carry, axis, "first")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert carry.matrix is not None
    transposed = carry_tensor(momentum_of(old, 0.9), Carry.rotate(carry.matrix.T), axis, "first")
    assert not torch.allclose(transposed, wanted, rtol=1e-2), "the oracle must see a transpose"


def test_second_moments_are_exact_for_uncorrelated_components() -> None:
    # At every step one component alone has a gradient, so that no product of two ever counts.
    matrix = rand(3, 4, seed=5)
    gradients = [torch.zeros(4, 6, dtype=torch.float64) for _ in range(12)]
    for t, gradient in enumerate(gradients):
        gradient[t % 4] = rand(6, seed=t)
    wanted = second_moment_of([matrix @ g for g in gradients], 0.99)
    found = carry_tensor(second_moment_of(gradients, 0.99), Carry.rotate(matrix), 0, "second")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    mixed = [g + g.roll(1, 0) for g in gradients]
    wanted = second_moment_of([matrix @ g for g in mixed], 0.99)
    found = carry_tensor(second_moment_of(mixed, 0.99), Carry.rotate(matrix), 0, "second")
    assert not torch.allclose(found, wanted, rtol=1e-2), "correlated components are approximate"


@given(seed=st.integers(0, 100), role=st.sampled_from(["first", "weight"]))
def test_an_orthogonal_rotation_and_its_inverse_meet(seed: int, role: Role) -> None:
    rotation = orthogonal(5, seed)
    tensor = rand(5, 7, seed=seed)
    there = carry_tensor(tensor, Carry.rotate(rotation), 0, role)
    back = carry_tensor(there, Carry.rotate(rotation.T), 0, role)
    torch.testing.assert_close(back, tensor, rtol=1e-12, atol=1e-12)


@given(rank=st.integers(1, 8), seed=st.integers(0, 20))
def test_a_permutation_and_its_inverse_meet_bitwise(rank: int, seed: int) -> None:
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))
    tensor = rand(3, rank, seed=seed).float()
    there = carry_tensor(tensor, Carry.select(order.tolist()), 1, "second")
    assert torch.equal(
        carry_tensor(there, Carry.select(order.argsort().tolist()), 1, "second"), tensor
    )


@pytest.mark.parametrize("role", ROLES)
def test_a_rotation_by_a_permutation_is_the_selection(role: Role) -> None:
    tensor = rand(5, 3).abs().float()
    indices = [3, 0, 4]
    wanted = carry_tensor(tensor, Carry.select(indices, 1, 1), 0, role)
    matrix = selection_matrix(indices, 5)
    torch.testing.assert_close(
        carry_tensor(tensor, Carry.rotate(matrix, 1, 1), 0, role), wanted, rtol=2e-7, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("role", ROLES)
def test_dtype_is_kept_and_rounded_once(dtype: torch.dtype, role: Role) -> None:
    tensor, matrix = rand(6, 40).abs().to(dtype), rand(4, 6)
    found = carry_tensor(tensor, Carry.rotate(matrix, 1), 0, role)
    exact = carry_tensor(tensor.double(), Carry.rotate(matrix, 1), 0, role)
    assert found.dtype == dtype
    assert torch.equal(found[:4], exact[:4].to(dtype))
    assert carry_tensor(tensor, Carry.select([1], 2, 1), 0, role).dtype == dtype


def test_autocast_does_not_reach_the_computation() -> None:
    tensor, matrix = rand(6, 40).float(), rand(4, 6).float()
    wanted = carry_tensor(tensor, Carry.rotate(matrix), 0, "first")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(carry_tensor(tensor, Carry.rotate(matrix), 0, "first"), wanted)


def test_neither_storage_nor_graph_is_shared() -> None:
    tensor = rand(3, 3).requires_grad_()
    found = carry_tensor(tensor, Carry.keep(3), 0, "weight")
    assert torch.equal(found, tensor)
    assert not found.requires_grad
    found.add_(1)
    assert not torch.equal(found, tensor)


def test_magnitudes_go_by_their_squares() -> None:
    tensor, matrix = rand(4, 5).abs(), rand(3, 4)
    wanted = carried_by_loops(tensor.square(), matrix, squared=True).sqrt()
    torch.testing.assert_close(carry_tensor(tensor, Carry.rotate(matrix), 0, "magnitude"), wanted)


def test_a_centred_variance_stays_positive() -> None:
    # Constant gradients have no variance: T*T of the mean square would fall below the squared mean.
    mean = torch.full((2, 3), 2.0)
    matrix = torch.tensor([[0.6, 0.8], [0.8, -0.6]])
    carry = Carry.rotate(matrix, fresh=1)
    new = carry_tensor(mean, carry, 0, "first")
    plain = carry_tensor(mean.square(), carry, 0, "second")
    assert (plain - new.square()).min() < -1, "the plain rule is what this guards against"
    centred = carry_centred(mean.square(), mean, carry, 0)
    assert (centred - new.square()).min() > -1e-5
    assert torch.equal(centred[2], centred[:2].double().mean(0).float())


def test_a_centred_variance_is_exact_for_independent_components() -> None:
    matrix = rand(3, 3)
    mean, variance = rand(3, 4), rand(3, 4, seed=1).abs()
    new_mean = carried_by_loops(mean, matrix)
    wanted = carried_by_loops(variance, matrix, squared=True) + new_mean.square()
    found = carry_centred(variance + mean.square(), mean, Carry.rotate(matrix), 0)
    torch.testing.assert_close(found, wanted)
    chosen = carry_centred(variance, mean, Carry.select([2, 0]), 0)
    assert torch.equal(chosen, variance[[2, 0]])


@given(case=selections(), keepdim=st.booleans())
def test_factored_estimates_of_kept_components_do_not_change(
    case: tuple[int, list[int], int, int], keepdim: bool
) -> None:
    rank, indices, fresh, blank = case
    assume(indices)
    V = torch.outer(rand(rank).abs() + 0.1, rand(6, seed=1).abs() + 0.1)
    along, across = V.mean(1, keepdim=keepdim), V.mean(0, keepdim=keepdim)
    carry = Carry.select(indices, fresh, blank)
    new_along, new_across = carry_factored(along, across, carry, 0)
    assert new_across.shape == across.shape
    found = factored_estimate(new_along, new_across)
    torch.testing.assert_close(found[: len(indices)], V[indices], rtol=1e-12, atol=0)
    torch.testing.assert_close(new_along.mean(), new_across.mean(), rtol=1e-12, atol=0)
    # The statistics over the components are what they would be for the new matrix.
    wanted = carried_by_loops(
        V, selection_matrix(indices, rank), fresh=fresh, blank=blank, squared=True
    ).mean(0, keepdim=keepdim)
    torch.testing.assert_close(new_across, wanted, rtol=1e-12, atol=0)


def test_the_factored_oracle_sees_statistics_left_behind() -> None:
    V = torch.outer(torch.tensor([1.0, 10.0, 100.0]).double(), rand(4).abs())
    along, across = V.mean(1), V.mean(0)
    left_behind = factored_estimate(along[:1], across)
    assert not torch.allclose(left_behind, V[:1], rtol=0.5)
    torch.testing.assert_close(
        factored_estimate(*carry_factored(along, across, Carry.select([0]), 0)), V[:1]
    )


def test_factored_zeros_stay_finite() -> None:
    for along in (torch.zeros(3), torch.tensor([0.0, 0.0, 1.0])):
        new, across = carry_factored(along, torch.ones(4), Carry.select([0, 1], 1), 0)
        assert torch.equal(across, torch.ones(4))
        assert not new.any()


@given(
    shape=st.sampled_from([(1,), (7, 3), (4, 4), (5, 5), (2, 3, 4)]),
    block=st.sampled_from([4, 16, 256]),
    signed=st.booleans(),
    seed=st.integers(0, 50),
)
def test_blocks_get_the_nearest_codes(
    shape: tuple[int, ...], block: int, signed: bool, seed: int
) -> None:
    codes = torch.linspace(-0.99 if signed else 0.0, 1.0, 256).pow(3)
    codes[100 if signed else 0] = 0
    codes = codes.sort().values
    tensor = rand(*shape, seed=seed).float()
    tensor = tensor if signed else tensor.abs()
    tensor.view(-1)[seed % tensor.numel()] = 0
    values, scales = quantise_blocks(tensor, codes, block)
    assert values.dtype == torch.uint8
    assert values.shape == tensor.shape
    wanted, wanted_scales = codes_by_loops(tensor, codes, block)
    assert torch.equal(scales, wanted_scales)
    found = dequantise_blocks(values, scales, codes, block)
    best = dequantise_blocks(wanted, scales, codes, block)
    error, least = (found - tensor).abs(), (best - tensor).abs()
    torch.testing.assert_close(error, least, rtol=1e-5, atol=1e-7)
    assert found.view(-1)[seed % tensor.numel()] == 0, "zero stays zero"
    twin = dequantise_blocks(wanted, scales.flip(0) * 1.5, codes, block)
    assert not tensor.any() or not torch.allclose(twin, best)


def test_blocks_agree_with_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        codes = functional.create_dynamic_map(signed=signed)
        tensor = rand(20, 33).float() if signed else rand(20, 33).float().abs()
        tensor[3:15] = 0
        theirs, quantised = functional.quantize_blockwise(tensor, code=codes, blocksize=256)
        decoded = functional.dequantize_blockwise(
            theirs, absmax=quantised.absmax, code=codes, blocksize=256
        )
        assert torch.equal(dequantise_blocks(theirs, quantised.absmax, codes, 256), decoded)
        ours, scales = quantise_blocks(tensor, codes, 256)
        assert torch.equal(scales, quantised.absmax)
        error = (dequantise_blocks(ours, scales, codes, 256) - tensor).abs()
        assert (error <= (decoded - tensor).abs() + 1e-6).all(), "theirs is never nearer"


@given(gradient=st.floats(0.01, 10.0), step=st.sampled_from([2, 10, 100, 10_000]))
def test_a_seeded_second_moment_tames_the_first_step(gradient: float, step: int) -> None:
    """A new component beside carried ones of unit mean square, up to ten times their gradient."""
    carried = torch.ones(4, 1, dtype=torch.float64) * (1 - 0.999 ** (step - 1))
    grown = carry_tensor(carried, Carry.select(range(4), fresh=1), 0, "second")
    seeded = adam_step_length(gradient, float(grown[4, 0]), step)
    naive = adam_step_length(gradient, 0.0, step)
    assert abs(seeded) <= 1
    assert abs(naive) > abs(seeded)
    if step == 10_000:
        assert abs(naive) == pytest.approx(0.1 / math.sqrt(0.001), rel=1e-3)


def test_torch_adam_takes_the_long_first_step_that_the_seed_prevents() -> None:
    lengths = {}
    for name, second in (("naive", 0.0), ("seeded", 1.0)):
        weight = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
        optimizer = torch.optim.Adam([weight], lr=0.01)
        optimizer.state[weight] = {
            "step": torch.tensor(9_999.0),
            "exp_avg": torch.zeros(1, 1, dtype=torch.float64),
            "exp_avg_sq": torch.full((1, 1), second, dtype=torch.float64),
        }
        weight.grad = torch.full_like(weight, 1.5)
        optimizer.step()
        lengths[name] = weight.item() / 0.01
        assert lengths[name] == pytest.approx(adam_step_length(1.5, second, 10_000), rel=1e-3)
    assert abs(lengths["naive"]) > 3.1
    assert abs(lengths["seeded"]) < 0.2


def test_sizes() -> None:
    carry = Carry.select([4, 1], fresh=3, blank=2)
    assert (carry.carried, carry.size, carry.indices) == (2, 7, (4, 1))
    turned = Carry.rotate(torch.eye(3)[:2].requires_grad_(), fresh=1)
    assert (turned.carried, turned.size) == (2, 3)
    assert turned.matrix is not None
    assert not turned.matrix.requires_grad
    assert Carry.keep(3).keeps_all(3)
    for other in (Carry.keep(2), Carry.select([0, 2, 1]), Carry.select(range(3), blank=1)):
        assert not other.keeps_all(3)
    assert not Carry.select([], fresh=3).keeps_all(3)
    assert not Carry.rotate(torch.eye(3)).keeps_all(3)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "either indices or a matrix"),
        ({"indices": (0,), "matrix": torch.eye(1)}, "not both"),
        ({"indices": (0, 0)}, "distinct"),
        ({"indices": (-1,)}, "not negative"),
        ({"indices": (0,), "fresh": -1}, "fresh=-1"),
        ({"indices": (0,), "blank": -1}, "blank=-1"),
        ({"indices": ()}, "nothing would be left"),
        ({"matrix": torch.ones(3)}, "floating-point matrix"),
        ({"matrix": torch.ones(2, 2, dtype=torch.long)}, "floating-point matrix"),
        ({"matrix": torch.full((1, 1), math.nan)}, "NaN"),
    ],
)
def test_contradictions_are_refused(fields: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Carry(**fields)


def test_misfits_are_refused() -> None:
    tensor = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="beyond the 3 components"):
        carry_tensor(tensor, Carry.select([3]), 0, "first")
    with pytest.raises(ValueError, match="3 components"):
        carry_tensor(tensor, Carry.rotate(torch.eye(2)), 0, "first")
    with pytest.raises(ValueError, match="role 'third'"):
        carry_tensor(tensor, Carry.keep(3), 0, "third")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        Carry.select([0.5])  # pyright: ignore[reportArgumentType]
