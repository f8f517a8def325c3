"""Gradients on the straight path from the pre-trained model to the trained adapter.

At a point α the model computes with ``α ΔW`` in the place of ``ΔW``, and the gradient asked for is
the one *at* that point, with respect to the factors as they are: ``g(α) = dL/dw`` at ``α ΔW``
without the factor α that the chain rule would put before it. It is defined at α = 0 as well.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradrank.core.errors import MeasurementError

FACTORS = ("A", "B", "lam")
# Along which axis a factor, and whatever is laid out like it, has its components.
RANK_AXIS = {"A": 0, "B": 1, "lam": 0}
_REENTRANT = (
    "reentrant activation checkpointing cannot give the gradients of a scoring pass. Train with "
    "gradient_checkpointing_kwargs={'use_reentrant': False}."
)


@dataclass(frozen=True, slots=True)
class Branch:
    """The adapter of one target, as far as the path concerns it.

    Attributes:
        name: Name of the target.
        inner: The module that computes ``A x``.
        outer: The module that computes ``B (A x)``.
        learned: The learned tensors by factor: ``A`` (Q, ``[r, d_in]``), ``B`` (P, ``[d_out, r]``)
            and ``lam`` (λ, ``[r]``).
        rank: Components in use, the first ones.
    """

    name: str
    inner: nn.Module
    outer: nn.Module
    learned: Mapping[str, Tensor]
    rank: int


class _ScaleValue(torch.autograd.Function):
    """``α v``, whose gradient passes as if it were ``v``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, alpha: float) -> Tensor:  # noqa: ARG004
        return value * alpha

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class _ScaleGradient(torch.autograd.Function):
    """``v``, whose gradient is multiplied by α."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.alpha, None


@contextlib.contextmanager
def at_point(branches: Sequence[Branch], alpha: float) -> Iterator[None]:
    """Put a model at a point of the path inside the block.

    The value of every branch is scaled behind B, and the gradient that leaves it before A; so the
    network's own gradients are those of ``α ΔW``, and the factors get theirs without α.

    Args:
        branches: The adapters on the path, all at the same α.
        alpha: The point.

    Yields:
        None; forward and backward pass both belong inside.
    """
    handles = []
    try:
        for branch in branches if alpha != 1 else ():
            handles.append(branch.inner.register_forward_pre_hook(_before(alpha)))
            handles.append(branch.outer.register_forward_hook(_behind(alpha)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(alpha: float) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (_ScaleGradient.apply(args[0], alpha), *args[1:]) if args else None

    return hook


def _behind(alpha: float) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Any:
        return _ScaleValue.apply(output, alpha)

    return hook


def gradients(
    loss: Tensor, branches: Sequence[Branch], factors: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Return the loss's gradients by target and factor, without touching any ``.grad``.

    Args:
        loss: Scalar loss.
        branches: The adapters.
        factors: Which factors.

    Returns:
        Gradients; zero for a target that the loss does not depend on.

    Raises:
        MeasurementError: If no factor has a gradient, or the model checkpoints activations in the
            reentrant way, which gives gradients to ``.grad`` only.
        RuntimeError: If torch refuses for another reason.
    """
    wanted = [branch.learned[factor] for branch in branches for factor in factors]
    try:
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        raise MeasurementError(_REENTRANT) from error
    if any(grad is None for grad in found) and _reentrant(loss):
        raise MeasurementError(_REENTRANT)
    if all(grad is None for grad in found):
        raise MeasurementError(
            f"the loss depends on none of the {len(branches)} adapters. Check that the model that "
            "is trained is the one that was given."
        )
    filled = iter(
        torch.zeros_like(tensor) if grad is None else grad
        for tensor, grad in zip(wanted, found, strict=True)
    )
    return {branch.name: {factor: next(filled) for factor in factors} for branch in branches}


def _reentrant(loss: Tensor) -> bool:
    """Whether a reentrant checkpoint, which hides its parameters, is in a loss's graph."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        left += [following for following, _ in node.next_functions]
    return False
