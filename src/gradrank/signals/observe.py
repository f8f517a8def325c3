"""The observer: hooks that show a target's inputs and output gradients to probes.

For a linear target the weight gradient of a batch is ``G = Δᵀ X`` (``X [T, d_in]`` inputs,
``Δ [T, d_out]`` output gradients). Probes see X in the forward pass and may keep what they need
of it; they see Δ in the backward pass. No weight gradient is ever formed, so frozen, quantised
and sharded weights are all alike.

What a probe keeps is handed to autograd to save, as it saves activations of its own. So it is
dropped and computed again wherever gradient checkpointing does that to activations, moved
wherever they are moved (``torch.autograd.graph.save_on_cpu``), and freed with the graph.
"""

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradrank.core.errors import MeasurementError
from gradrank.core.targets import Target
from gradrank.signals.layers import Site

Kept = Tensor | tuple[Tensor, ...]


class Probe(Protocol):
    """What gathers a statistic from inputs and output gradients."""

    def share_key(self, target: Target) -> object:
        """Targets with equal keys and the same input tensor get one ``on_input`` result."""
        ...

    def on_input(self, target: Target, x: Tensor) -> Kept:
        """Return what must be kept of ``x [T, d_in]`` until the backward pass.

        Called again for the same input where a checkpointed block computes it again.
        """
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

    def _grad_hook(self, target: Target, kept: list[Kept]) -> Callable[[Tensor], None]:
        saved = _Saved(target, kept)

        def hook(grad: Tensor) -> None:
            # Before anything else: a checkpointed block is computed again here, in its own modes.
            parts = saved.parts()
            # Sketches are made in float32 also where backward() stands inside an autocast block.
            with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
                self.reached.add(target.name)
                delta = grad.detach().reshape(-1, target.d_out)
                for probe, part in zip(self._probes, parts, strict=True):
                    probe.on_output_grad(target, part, delta)

        return hook

    def _keep(self, target: Target, x: Tensor) -> list[Kept]:
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


class _Node(torch.autograd.Function):
    """A node beside the graph, which no gradient passes through: it only saves tensors."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _Saved:
    """What the probes keep of one call's input, saved by autograd."""

    def __init__(self, target: Target, kept: Sequence[Kept]) -> None:
        self._target = target
        tensors = [part for one in kept for part in (one if isinstance(one, tuple) else (one,))]
        # None: a single tensor. The tensors themselves must not be held on to here.
        self._lengths = [len(one) if isinstance(one, tuple) else None for one in kept]
        # Not the target's output, whose hook holds this object: that would be a cycle.
        anchor = torch.empty(0, requires_grad=True)
        self._node: Any = _Node.apply(anchor, *tensors).grad_fn if tensors else None

    def parts(self) -> list[Kept]:
        """Return what was kept, probe by probe; to be called once per backward pass."""
        if self._node is None:
            return []
        try:
            tensors = iter(self._node.saved_tensors)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise MeasurementError(
                f"the input of '{self._target.name}' was changed in place after the module had "
                "read it, so its weight gradient cannot be computed any more. Replace the in-place "
                "operation in the model's code."
            ) from error
        return [
            next(tensors) if length is None else tuple(next(tensors) for _ in range(length))
            for length in self._lengths
        ]


def _own(output: Tensor) -> Tensor:
    """Return the tensor whose gradient survives an in-place operation on the output.

    Such an operation on a view (the output of a linear layer with bias on a 3-D input) gives the
    view a new history, and hooks on the old one never run; those of its base do.
    """
    base = output._base
    if base is None or not base.requires_grad or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output
