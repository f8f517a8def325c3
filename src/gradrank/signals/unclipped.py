"""Complete gradients of some parameters as backward left them, before anybody clips them.

When an optimizer's step begins, gradients have been accumulated, averaged over processes and
clipped. The copies here are taken as each micro-batch's gradient arrives; the last one of a step
holds the sum over its micro-batches. Under DistributedDataParallel a copy is taken before the
gradients are averaged, so the copies are averaged here.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradrank.signals.distributed import is_distributed


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

        Returns:
            One tensor per parameter, in the order of :meth:`open`; zero where none arrived.
        """
        held = [self._copies.get(id(parameter)) for parameter in self._parameters]
        found = [
            torch.zeros_like(parameter, requires_grad=False) if copy is None else copy
            for parameter, copy in zip(self._parameters, held, strict=True)
        ]
        self.close()
        return averaged(found) if is_distributed() else found

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


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean of tensors over all processes, equal to the last bit in all of them.

    Args:
        tensors: Of equal shapes and dtypes in all processes.

    Returns:
        The means, in the same order.
    """
    found = list(tensors)
    kinds = sorted({(str(t.dtype), str(t.device.type)) for t in found})
    for kind in kinds:
        places = [i for i, t in enumerate(found) if (str(t.dtype), str(t.device.type)) == kind]
        flat = torch.cat([found[i].reshape(-1) for i in places])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([found[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            found[i] = part.view(found[i].shape)
    return found
