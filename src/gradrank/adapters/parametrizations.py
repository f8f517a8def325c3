"""The parametrizations behind the forms: how a LoRA factor follows from its learned tensors."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradrank.core.errors import OptionError


class Form(nn.Module):
    """How one weight follows from its learned tensors; stateless except for small buffers."""

    kind: ClassVar[str]
    product: Callable[..., Tensor] | None = None
    """``product(x, bias, *originals)``, where that is faster than multiplying by the weight."""

    def compose(self, **learned: Tensor) -> Tensor:
        """Return the weight as the layer uses it.

        Args:
            **learned: The learned tensors, by their name in :func:`learned_tensors`.
        """
        raise NotImplementedError

    def compact(self, weight: Tensor) -> Tensor:
        """Return the weight as a stock adapter stores it."""
        return weight.detach()

    def parts(self, value: Tensor, **learned: Tensor) -> dict[str, Tensor]:
        """Return learned tensors that compose to a stored weight.

        Args:
            value: The stored weight.
            **learned: The present learned tensors.
        """
        raise NotImplementedError


class Masked(Form):
    """A form of a fixed shape, of whose components the first ``active`` count.

    Attributes:
        active: How many components count.
        mask: Boolean ``[r]``; None where all components always count and the shape may change.
    """

    active: int
    mask: Tensor | None

    def set_active(self, active: int) -> None:
        """Change the number of active components in place, without a new graph."""
        if self.mask is not None:
            self.active = active
            self.mask.copy_(_prefix(self.mask.numel(), active, self.mask.device))

    def stored(self, rank: int) -> int:
        """Return how many of ``rank`` components a stock adapter stores: none is impossible."""
        return rank if self.mask is None else max(self.active, 1)

    def narrowed(self, weight: Tensor, axis: int) -> Tensor:
        """Return the stored components of a weight only, detached and contiguous."""
        kept = weight.detach().narrow(axis, 0, self.stored(weight.shape[axis]))
        return kept.clone(memory_format=torch.contiguous_format)

    def check_stored(self, value: Tensor, original: Tensor, axis: int) -> int:
        """Return how many components a stored weight has, if it fits.

        Args:
            value: The stored weight.
            original: The learned tensor that it is for.
            axis: Rank axis of both.

        Raises:
            OptionError: If it fits neither the active components nor all of them.
        """
        rank, size = original.shape[axis], value.shape[axis]
        wanted = list(original.shape)
        wanted[axis] = size
        if list(value.shape) != wanted or size not in {rank, self.stored(rank)}:
            raise OptionError(
                f"the stored weight is {list(value.shape)}, but the layer is "
                f"{list(original.shape)} with {self.active} of {rank} components active. Call "
                "set_active with the stored rank first, or resize the layer."
            )
        return size


class ComponentMask(Masked):
    """``weight = mask * original`` along the rank axis; the first ``active`` components count.

    The choice is made by ``where`` on a boolean buffer and not by a product: gradients of dormant
    components are exactly zero even beside infinities, and no cast of the model changes the
    mask's dtype, and with it the weight's.

    Args:
        rank: Components r.
        active: How many of them count.
        axis: Rank axis of the weight: 0 for A ``[r, d_in]``, 1 for B ``[d_out, r]``.
        device: Where the weight is.
    """

    kind = "mask"
    mask: Tensor  # pyright: ignore[reportIncompatibleVariableOverride] - always there

    def __init__(self, rank: int, active: int, axis: int, device: torch.device) -> None:
        super().__init__()
        self.axis = axis
        self.active = active
        self.register_buffer("mask", _prefix(rank, active, device), persistent=False)

    def forward(self, original: Tensor) -> Tensor:
        """Return the weight from its original."""
        return torch.where(self.mask.unsqueeze(1 - self.axis), original, 0.0)

    def compose(self, **learned: Tensor) -> Tensor:
        """Return the weight as the layer uses it."""
        return self.forward(learned["original"])

    def compact(self, weight: Tensor) -> Tensor:
        """Return the stored components only, contiguous."""
        return self.narrowed(weight, self.axis)

    def parts(self, value: Tensor, **learned: Tensor) -> dict[str, Tensor]:
        """Return learned tensors that compose to a stored weight."""
        original = learned["original"]
        rank, size = original.shape[self.axis], self.check_stored(value, original, self.axis)
        if size == rank:
            return {"original": value}
        rest = original.narrow(self.axis, size, rank - size).to(value)
        rest = torch.zeros_like(rest) if self.axis == 1 else rest
        return {"original": torch.cat([value, rest], dim=self.axis)}

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the original for a weight that is assigned."""
        return value


class Singular(Masked):
    """``B = P diag(λ)``, with ``P`` in the place of the weight and λ a parameter of its own.

    At a fixed shape dormant components are chosen away in both, so that neither gets any gradient
    from them, whatever they hold.

    Args:
        lam: λ ``[r]``.
        requires_grad: Whether λ is trained.
        fixed: Whether the shape is fixed, and all components count at first.
    """

    kind = "svd"

    def __init__(self, lam: Tensor, requires_grad: bool, fixed: bool = False) -> None:
        super().__init__()
        self.lam = nn.Parameter(lam, requires_grad=requires_grad)
        self.active = lam.numel()
        mask = _prefix(self.active, self.active, lam.device) if fixed else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, original: Tensor) -> Tensor:
        """Return the weight from its original."""
        return self._product(original, self.lam)

    def compose(self, **learned: Tensor) -> Tensor:
        """Return the weight as the layer uses it."""
        return self._product(learned["original"], learned["0.lam"])

    def _product(self, P: Tensor, lam: Tensor) -> Tensor:
        if self.mask is None:
            return P * lam
        return torch.where(self.mask, P, 0.0) * torch.where(self.mask, lam, 0.0)

    def compact(self, weight: Tensor) -> Tensor:
        """Return the stored components only, contiguous."""
        return weight.detach() if self.mask is None else self.narrowed(weight, 1)

    def parts(self, value: Tensor, **learned: Tensor) -> dict[str, Tensor]:
        """Return learned tensors that compose to a stored weight; those that do already stay."""
        P = learned["original"]
        present = self.compact(self.compose(**learned))
        if present.shape == value.shape and torch.equal(present, value.to(present)):
            # A resumed run has P and λ from its sidecar; the plain save says nothing new.
            return {"original": P.detach(), "0.lam": learned["0.lam"].detach()}
        # One factor alone has no singular values, but λ = 1 and P = B are the same function.
        lam = torch.ones_like(learned["0.lam"], dtype=value.dtype, device=value.device)
        if self.mask is None:
            same_shape(value, P)
        elif (size := self.check_stored(value, P, 1)) < P.shape[1]:
            lam[size:] = 0.0
            value = torch.cat([value, P[:, size:].to(value)], dim=1)
        return {"original": value, "0.lam": lam}

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the original for a weight that is assigned."""
        with torch.no_grad():
            self.lam.fill_(1.0)
        return value


def _prefix(rank: int, active: int, device: torch.device) -> Tensor:
    return torch.arange(rank, device=device) < active


def same_shape(value: Tensor, present: Tensor) -> None:
    """Check a tensor that is about to be loaded.

    Args:
        value: What is given.
        present: What it is to replace.

    Raises:
        OptionError: If the shapes differ.
    """
    if value.shape != present.shape:
        raise OptionError(
            f"the given tensor is {list(value.shape)} and the layer's {list(present.shape)}. "
            "Resize the layer to the ranks it was saved with first."
        )
