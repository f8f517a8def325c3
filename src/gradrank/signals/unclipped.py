"""Complete gradients of some parameters as backward left them, before anybody clips them.

When an optimizer's step begins, gradients have been accumulated, averaged over processes and
clipped. The copies here are taken as each micro-batch's gradient arrives; the last one of a step
holds the sum over its micro-batches. Under DistributedDataParallel a copy is taken before the
gradients are averaged. What clipping left of the average is a multiple of what is wanted, and six
numbers per target show which multiple; the copies themselves travel only where it is none.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradrank.signals.distributed import gather, is_distributed, sum_over_processes

# How far the multiple may differ between parameters: rounding in bfloat16 stays below.
_TOLERANCE = 2e-3


class UnclippedGradients:
    """Copies of gradients, from :meth:`open` to :meth:`take` or :meth:`close`."""

    def __init__(self) -> None:
        self._copies: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._parameters: list[nn.Parameter] = []

    @property
    def is_open(self) -> bool:
        """Whether gradients are being copied."""
        return bool(self._handles)

    def open(self, parameters: Sequence[nn.Parameter]) -> None:
        """Begin to copy the gradients of some parameters.

        Args:
            parameters: The parameters; equally many and in the same order in all processes.
        """
        self.close()
        self._parameters = list(parameters)
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._copy)
            for parameter in self._parameters
            if parameter.requires_grad
        ]

    def take(self) -> list[Tensor]:
        """Return the gradients, averaged over processes, and stop copying.

        Called where the optimizer's step begins, with the averaged gradients in ``.grad``.

        Returns:
            One tensor per parameter, in the order of :meth:`open`; zero where none arrived.
        """
        parameters = self._parameters
        held = [self._copies.get(id(parameter)) for parameter in self._parameters]
        found = [
            torch.zeros_like(parameter, requires_grad=False) if copy is None else copy
            for parameter, copy in zip(self._parameters, held, strict=True)
        ]
        self.close()
        return averaged(found, [p.grad for p in parameters]) if is_distributed() else found

    def close(self) -> None:
        """Stop copying and forget; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        self._copies, self._parameters = {}, []

    @torch.no_grad()
    def _copy(self, parameter: Tensor) -> None:
        grad = parameter.grad
        held = self._copies.get(id(parameter))
        if grad is None:
            return
        if held is None:
            self._copies[id(parameter)] = grad.detach().clone()
        else:
            held.copy_(grad)


@torch.no_grad()
def averaged(own: Sequence[Tensor], shared: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the mean of gradients over all processes, equal to the last bit in all of them.

    Args:
        own: This process's gradients, of equal shapes and dtypes in all processes.
        shared: What averaging over processes and clipping made of them; None: nothing.

    Returns:
        The means, in the same order.
    """
    factor = _multiple(own, shared)
    if factor is not None:
        return [
            torch.zeros_like(mine) if grad is None else grad.detach() * factor
            for mine, grad in zip(own, shared, strict=True)
        ]
    found = [mine.clone() for mine in own]
    sum_over_processes(found)
    return [mean.div_(dist.get_world_size()) for mean in found]


def _multiple(own: Sequence[Tensor], shared: Sequence[Tensor | None]) -> float | None:
    """Find the one factor by which ``shared`` is smaller than the mean of ``own``.

    With m the mean over processes and g what is shared, ``m = c g`` makes ``<m, g> = c <g, g>`` for
    each parameter; and ``<m, g>`` is the mean of ``<own, g>``.

    Args:
        own: This process's gradients.
        shared: What is in ``.grad``.

    Returns:
        c, the same in all processes; None if no number is.
    """
    rows = []
    for mine, grad in zip(own, shared, strict=True):
        left = mine.detach().float().flatten()
        right = torch.zeros_like(left) if grad is None else grad.detach().float().flatten()
        rows.append(torch.stack([left @ right, right @ right, left @ left]))
    if not rows:
        return 1.0
    table = torch.stack([row.to(rows[0].device) for row in rows]).double()
    inner, squares, lengths = torch.stack(gather(table)).unbind(dim=2)
    if not (
        bool(torch.isfinite(inner).all()) and torch.equal(squares, squares[:1].expand_as(squares))
    ):
        return None
    squares, inner = squares[0], inner.mean(dim=0)
    moved = squares > 0
    if not bool(moved.any()):
        return None if bool(lengths.any()) else 1.0
    factor = float(inner.sum() / squares.sum())
    apart = (inner[moved] / squares[moved] - factor).abs().max()
    lost = bool(lengths[:, ~moved].any())
    return None if lost or not factor > 0 or float(apart) > _TOLERANCE * factor else factor
