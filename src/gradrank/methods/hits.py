"""What methods remember that look at output neurons: hits, shares of importance, looks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradrank.allocation.neurons import NeuronCounts
from gradrank.core.errors import MeasurementError, OptionError
from gradrank.core.targets import Target


class HitCounts:
    """How often each output neuron was more important than the mean one of its target.

    A neuron's share of its target's importance is added up too, so that a look counts the same
    whatever the loss, the batch or a gradient scaler made of the size of gradients. A target
    without any importance (no gradient reached it) does not count a look.

    Attributes:
        hits: H by target name, ``[d_out]`` int64.
        shares: Sum over looks of the share of the importance by target name, ``[d_out]`` float64.
        looks: Looks that counted, by target name.

    Source:
        PiLoRA, Algorithm 1, lines 4 and 10 to 12.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self._rows = {target.name: target.d_out for target in targets}
        self.hits = {n: torch.zeros(m, dtype=torch.int64) for n, m in self._rows.items()}
        self.shares = {n: torch.zeros(m, dtype=torch.float64) for n, m in self._rows.items()}
        self.looks = dict.fromkeys(self._rows, 0)

    @torch.no_grad()
    def look(self, importance: Mapping[str, Tensor]) -> None:
        """Take in one look, of all targets or none.

        Args:
            importance: ``S_i`` by target name, ``[d_out]``; targets may be missing.

        Raises:
            MeasurementError: If a target is unknown or has another number of rows, or if an
                importance is negative or not finite.
        """
        # In double precision the mean of equal numbers is that number, so that none is above it.
        known = {n: found.detach().to("cpu", torch.float64) for n, found in importance.items()}
        for name, found in known.items():
            if found.shape != (self._rows.get(name),):
                raise MeasurementError(
                    f"target '{name}' has {self._rows.get(name, 'no')} output rows in this run, "
                    f"and an importance of shape {tuple(found.shape)}. Look at this run's targets."
                )
            if not bool(((found >= 0) & (found < torch.inf)).all()):
                raise MeasurementError(
                    f"the importance of the neurons of '{name}' is negative or not finite. Leave "
                    "out a look at gradients that overflowed; if all do, lower the learning rate."
                )
        for name, found in known.items():
            total = found.sum()
            if total > 0:
                self.hits[name] += found > total / len(found)
                self.shares[name] += found / total
                self.looks[name] += 1

    def counts(self) -> dict[str, NeuronCounts]:
        """Return what is remembered, by target name, for the rules of allocation."""
        return {
            name: NeuronCounts(hits.numpy(), self.shares[name].numpy(), self.looks[name])
            for name, hits in self.hits.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return hits, shares and looks by ``KIND/TARGET``."""
        saved = {f"hits/{name}": hits.clone() for name, hits in self.hits.items()}
        saved |= {f"shares/{name}": shares.clone() for name, shares in self.shares.items()}
        return saved | {f"looks/{name}": torch.tensor(n) for name, n in self.looks.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned; nothing changes if it is refused.

        Args:
            state: Tensors by key.

        Raises:
            OptionError: If a target is missing, or its numbers cannot be counts of this run.
        """
        hits, shares, looks = {}, {}, {}
        for name, rows in self._rows.items():
            kinds = [state.get(f"{kind}/{name}") for kind in ("hits", "shares", "looks")]
            if not _possible(rows, kinds):
                raise OptionError(
                    f"the saved state has no counts of the {rows:,} neurons of '{name}' that "
                    "could be right: it is damaged, or belongs to another run. Resume from "
                    "another checkpoint."
                )
            found = [tensor.to("cpu", copy=True) for tensor in kinds if tensor is not None]
            hits[name], shares[name], looks[name] = found[0], found[1], int(found[2])
        self.hits, self.shares, self.looks = hits, shares, looks


def _possible(rows: int, kinds: Sequence[Tensor | None]) -> bool:
    dtypes = (torch.int64, torch.float64, torch.int64)
    shapes = ((rows,), (rows,), ())
    for tensor, dtype, shape in zip(kinds, dtypes, shapes, strict=True):
        if tensor is None or tensor.dtype != dtype or tensor.shape != shape:
            return False
        # Also false where it is NaN.
        if not bool(((tensor >= 0) & (tensor < torch.inf)).all()):
            return False
    hits, shares, looks = kinds
    if hits is None or shares is None or looks is None:
        return False
    right = abs(float(shares.sum()) - int(looks)) <= 1e-6 * (1 + int(looks))
    return right and bool((hits <= looks).all())
