"""The mini-batches that training has just seen, seen again at other points of the path.

A plain loop hands nobody its batches, and a Trainer hands them to the model alone. So the model's
own call is what is remembered: its arguments, the random state before it (so that dropout falls
on the same units again), the autocast setting, and, where a gradient at α = 1 is asked for, the
one that training computes anyway.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from gradrank.core.errors import MeasurementError
from gradrank.signals.loss import loss_of, model_loss
from gradrank.signals.path import Branch

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass
class MicroBatch:
    """One call of the model in training, and what it takes to repeat it.

    Attributes:
        args: Positional arguments.
        kwargs: Named arguments.
        random: Random states before the call.
        autocast: Device, whether autocast was on, and its dtype.
        loss: The model's own loss, once it is known.
        scale: What the loss was multiplied by before its backward pass (accumulation, scaler).
        grads: Gradients of training by ``(target, factor)``, times ``scale``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: tuple[Tensor, list[Tensor]]
    autocast: tuple[str, bool, torch.dtype]
    loss: float | None = None
    scale: float | None = None
    grads: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def training_gradients(
        self, branches: Sequence[Branch], factors: Sequence[str]
    ) -> dict[str, dict[str, Tensor]] | None:
        """Return the gradients at α = 1 as the training pass computed them.

        Args:
            branches: The adapters.
            factors: Which factors.

        Returns:
            Gradients of the model's own mean loss, or None where they cannot be had: the loss that
            was trained on is not the model's own, or the gradients overflowed.
        """
        keys = [(branch.name, factor) for branch in branches for factor in factors]
        if not self.scale or any(key not in self.grads for key in keys):
            return None
        scale = self.scale
        found = {key: self.grads[key].float() / scale for key in keys}
        if not is_finite(found.values()):
            return None
        return {b.name: {factor: found[b.name, factor] for factor in factors} for b in branches}


class Replay:
    """Remembers the last training micro-batches of a step and repeats them.

    Attributes:
        batches: The micro-batches, oldest first.
    """

    def __init__(
        self,
        model: nn.Module,
        size: int = 1,
        loss_function: LossFunction | None = None,
        rows: float = 1.0,
    ) -> None:
        """Prepare; nothing is remembered before :meth:`open`.

        Args:
            model: The model inside all wrappings for several processes.
            size: How many of a step's last micro-batches are remembered.
            loss_function: ``loss_function(model, batch)`` where the model does not return its own
                loss; ``batch`` is what the model was called with, its named arguments or, if there
                are none, its positional ones.
            rows: Share of a micro-batch's rows that is remembered, the first ones, at least one.
        """
        self._model, self._loss_function, self._rows = model, loss_function, rows
        self._handles: list[RemovableHandle] = []
        self._replaying = False
        # Micro-batches whose losses have been gone back from since the last call of the model.
        self._behind_now: list[MicroBatch] = []
        self.batches: deque[MicroBatch] = deque(maxlen=size)

    def open(self, shared: Mapping[tuple[str, str], Tensor] | None = None) -> None:
        """Begin to remember.

        Args:
            shared: Learned tensors by ``(target, factor)`` whose training gradients are wanted.
        """
        self.close()
        self.batches.clear()
        add = self._handles.append
        add(self._model.register_forward_pre_hook(self._before, with_kwargs=True))
        add(self._model.register_forward_hook(self._behind))
        for key, tensor in (shared or {}).items():
            add(tensor.register_hook(self._keep(key)))

    def close(self) -> None:
        """Remove every hook; what was remembered stays until the next :meth:`open`."""
        while self._handles:
            self._handles.pop().remove()

    def forget(self) -> None:
        """Drop what was remembered."""
        self.batches.clear()

    @property
    def is_open(self) -> bool:
        """Whether the hooks are installed."""
        return bool(self._handles)

    def loss(self, batch: MicroBatch) -> Tensor:
        """Repeat a micro-batch's forward pass as it was in training.

        The random state is set to what it was, so that dropout is the same in every repetition;
        use it inside :meth:`undisturbed`.

        Args:
            batch: The micro-batch.

        Returns:
            The loss, with its graph.
        """
        _set_random(batch.random)
        kind, enabled, dtype = batch.autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            if self._loss_function is not None:
                given = batch.kwargs or (batch.args[0] if len(batch.args) == 1 else batch.args)
                return self._loss_function(self._model, given)
            if not batch.args:
                return model_loss(self._model, batch.kwargs)
            return _own_loss(self._model(*batch.args, **batch.kwargs))

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Leave random states and running statistics after the block as they were before it.

        Yields:
            None.
        """
        norms = [m for m in self._model.modules() if isinstance(m, _BatchNorm)]
        held = [(b, b.clone()) for norm in norms for b in norm.buffers()]
        before = _random_states()
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False
            _set_random(before)
            with torch.no_grad():
                for buffer, value in held:
                    buffer.copy_(value)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._passes_by(module):
            return
        self._behind_now = []
        kind = next((p.device.type for p in self._model.parameters()), "cpu")
        enabled = torch.is_autocast_enabled(kind)
        autocast = (kind, enabled, torch.get_autocast_dtype(kind))
        if self._rows < 1:
            args, kwargs = _first_rows((args, kwargs), self._rows)
        self.batches.append(MicroBatch(args, dict(kwargs), _random_states(), autocast))

    def _behind(self, module: nn.Module, _args: Any, output: Any) -> None:
        if self._passes_by(module) or not self.batches:
            return
        batch = self.batches[-1]
        loss = loss_of(output)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        batch.loss = float(loss.detach())

        def scale(grad: Tensor) -> None:
            batch.scale = float(grad)
            self._behind_now.append(batch)

        loss.register_hook(scale)

    def _keep(self, key: tuple[str, str]) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            found = self._behind_now
            # Of several losses in one backward pass nobody can tell which gradient is whose.
            if not self._replaying and found and all(batch is found[0] for batch in found):
                # A copy: autograd keeps the tensor itself as .grad, to which further micro-batches
                # are added and which is unscaled, clipped and averaged in place.
                found[0].grads[key] = grad.detach().clone()

        return hook

    def _passes_by(self, module: nn.Module) -> bool:
        """Whether a call is none of training's: an evaluation, a repetition, a deep copy's."""
        return (
            self._replaying
            or module is not self._model
            or not module.training
            or not torch.is_grad_enabled()
        )


def _first_rows(call: tuple[Any, Any], share: float) -> tuple[Any, Any]:
    """The first rows of a call's arguments; what has another length than the batch stays whole."""
    tensors = [t for part in call for t in _tensors(part) if t.dim()]
    if not tensors:
        return call
    size = tensors[0].shape[0]
    kept = max(1, math.ceil(share * size))

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:kept] if value.dim() and value.shape[0] == size else value
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if type(value) in {list, tuple}:
            return type(value)(cut(item) for item in value)
        return value

    return cut(call[0]), cut(call[1])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif type(value) in {list, tuple}:
        for item in value:
            yield from _tensors(item)


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether all elements of some tensors are finite, with one transfer from the device.

    Args:
        tensors: The tensors.

    Returns:
        Whether they are; true if there are none.
    """
    # A sum is finite only if all its terms are; one that overflows is no use either.
    sums = [tensor.sum() for tensor in tensors]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def _own_loss(output: Any) -> Tensor:
    loss = loss_of(output)
    if loss is None:
        raise MeasurementError(
            f"the model returned a {type(output).__name__} without a loss, so that a scoring pass "
            "has nothing to take a gradient of. Pass labels to the model, or give a "
            "loss_function(model, batch)."
        )
    return loss


def _random_states() -> tuple[Tensor, list[Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def _set_random(states: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
