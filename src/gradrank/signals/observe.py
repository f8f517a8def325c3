"""The observer: hooks that show a target's inputs and output gradients to probes.

For a linear target the weight gradient of a batch is ``G = Δᵀ X`` (``X [T, d_in]`` inputs,
``Δ [T, d_out]`` output gradients). Probes see X in the forward pass and may keep what they need
of it; they see Δ in the backward pass. No weight gradient is ever formed, so frozen, quantised
and sharded weights are all alike.
"""

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradrank.core.targets import Target
from gradrank.signals.layers import Site


class Probe(Protocol):
    """What gathers a statistic from inputs and output gradients."""

    def share_key(self, target: Target) -> object:
        """Targets with equal keys and the same input tensor get one ``on_input`` result."""
        ...

    def on_input(self, target: Target, x: Tensor) -> Any:
        """Return what must be kept of ``x [T, d_in]`` until the backward pass."""
        ...

    def on_output_grad(self, target: Target, kept: Any, delta: Tensor) -> None:
        """Take in ``delta [T, d_out]`` with what was kept of the same call's input."""
        ...


class Observer:
    """Context manager that installs the hooks and always removes them.

    The graph of a frozen model starts at its first targets: where an output carries no gradient,
    it is replaced by a leaf of the same value, so that no parameter needs ``requires_grad``.

    Attributes:
        reached: Names of the targets whose output gradient was seen.
    """

    def __init__(self, sites: Sequence[Site], probes: Sequence[Probe]) -> None:
        self._sites = list(sites)
        self._probes = list(probes)
        self._handles: list[RemovableHandle] = []
        self._last_input: tuple[weakref.ref[Tensor], int, dict[object, Any]] | None = None
        self.reached: set[str] = set()

    def __enter__(self) -> "Observer":
        try:
            for site in self._sites:
                hook = self._forward_hook(site.target, site.module)
                self._handles.append(site.module.register_forward_hook(hook, with_kwargs=True))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        self._last_input = None

    def _forward_hook(self, target: Target, owner: nn.Module) -> Callable[..., Tensor | None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Tensor | None:
            if not torch.is_grad_enabled() or not isinstance(output, Tensor):
                # The first pass of reentrant checkpointing, or an evaluation: nothing flows back.
                return None
            if module is not owner:
                return None  # a deep copy of the model, which took the hooks along
            x = args[0] if args else next(iter(kwargs.values()))
            kept = self._keep(target, x)
            replaced = None
            if not output.requires_grad:
                # A copy and not the leaf itself, so that in-place operations may follow.
                replaced = output = output.detach().requires_grad_().clone()
            _own(output).register_hook(self._grad_hook(target, kept))
            return replaced

        return hook

    def _grad_hook(self, target: Target, kept: list[Any]) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            # Sketches are made in float32 also where backward() stands inside an autocast block.
            with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
                self.reached.add(target.name)
                delta = grad.detach().reshape(-1, target.d_out)
                for probe, part in zip(self._probes, kept, strict=True):
                    probe.on_output_grad(target, part, delta)

        return hook

    def _keep(self, target: Target, x: Tensor) -> list[Any]:
        """Let the probes look at an input, once for targets that share it (q, k and v)."""
        shared = self._shared(x)
        kept = []
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            rows = x.detach().reshape(-1, target.d_in)
            for index, probe in enumerate(self._probes):
                key = (index, probe.share_key(target))
                if key not in shared:
                    shared[key] = probe.on_input(target, rows)
                kept.append(shared[key])
        return kept

    def _shared(self, x: Tensor) -> dict[object, Any]:
        last = self._last_input
        # The version tells an input that was changed in place since from the one seen before.
        if last is None or last[0]() is not x or last[1] != x._version:
            last = self._last_input = (weakref.ref(x), x._version, {})
        return last[2]


def _own(output: Tensor) -> Tensor:
    """Return the tensor whose gradient survives an in-place operation on the output.

    Such an operation on a view (the output of a linear layer with bias on a 3-D input) gives the
    view a new history, and hooks on the old one never run; those of its base do.
    """
    base = output._base
    if base is None or not base.requires_grad or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output
