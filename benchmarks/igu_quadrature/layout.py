"""How gradients of an adapter in SVD form are laid out in one flat tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradrank.core.targets import Target
from gradrank.signals.path import FACTORS


@dataclass(frozen=True)
class Layout:
    """Where each stored target's factors stand in a flat gradient.

    Attributes:
        targets: Targets whose gradients are kept whole, in order.
        ranks: Rank per target.
        names: All targets, whose λ are kept, in order.
    """

    targets: tuple[Target, ...]
    ranks: Mapping[str, int]
    names: tuple[str, ...]

    def parts(self) -> Iterator[tuple[str, str, slice, tuple[int, ...]]]:
        """Yield target, factor, place and shape, in the order of storage."""
        at = 0
        for target in self.targets:
            r = self.ranks[target.name]
            shapes = {"A": (r, target.d_in), "B": (target.d_out, r), "lam": (r,)}
            for factor in FACTORS:
                size = int(torch.Size(shapes[factor]).numel())
                yield target.name, factor, slice(at, at + size), shapes[factor]
                at += size

    @property
    def size(self) -> int:
        """Elements of a flat gradient."""
        return max(place.stop for _, _, place, _ in self.parts())

    def split(self, flat: Tensor) -> dict[str, dict[str, Tensor]]:
        """Return views by target and factor.

        Args:
            flat: ``[size]``.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name, factor, place, shape in self.parts():
            found.setdefault(name, {})[factor] = flat[place].view(shape)
        return found

    def join(self, found: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Return the flat form of tensors by target and factor.

        Args:
            found: At least the stored targets.
        """
        pieces = [found[name][factor].detach().reshape(-1) for name, factor, _, _ in self.parts()]
        return torch.cat(pieces)

    def factor_of(self) -> Tensor:
        """Return the factor of every element, as its place in ``FACTORS``, ``[size]`` int8."""
        found = torch.empty(self.size, dtype=torch.int8)
        for _, factor, place, _ in self.parts():
            found[place] = FACTORS.index(factor)
        return found
