"""What a forward and backward pass would hold, weighed on a forward pass that holds nothing.

Autograd hands every tensor that it would save to a hook, and so does the observer. The hook notes
the bytes and saves nothing, so weighing takes little more memory than inference.
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradrank.core.targets import Target
from gradrank.signals.blocks import not_checkpointed, repeated_blocks
from gradrank.signals.held import FLOAT
from gradrank.signals.layers import Site
from gradrank.signals.observe import Kept, Observer, Probe
from gradrank.signals.untouched import untouched

_OUTSIDE = -1


@dataclass(frozen=True, slots=True)
class KeptInput:
    """Something that probes keep of an input.

    Attributes:
        size: Bytes.
        place: Index of the block that it is kept in; -1 outside of blocks.
        targets: Names of the targets that it is kept for.
    """

    size: int
    place: int
    targets: frozenset[str]


@dataclass(frozen=True, slots=True)
class PassMemory:
    """What one forward and backward pass over a micro-batch holds beyond the model, in bytes.

    Attributes:
        front: Saved outside of blocks, before the last one has run.
        tail: Saved after the last block: the head and the loss.
        blocks: Saved in each block.
        entries: Inputs of each block, counted where they are new.
        kept: What the probes keep.
        widest_tail: The largest tensor saved in the tail.
        widest_block: The largest tensor saved in a block.
        working: What probes hold for a moment, at most.
    """

    front: int
    tail: int
    blocks: tuple[int, ...]
    entries: tuple[int, ...]
    kept: tuple[KeptInput, ...]
    widest_tail: int
    widest_block: int
    working: int

    def activations(self, names: Collection[str], checkpoint: bool) -> int:
        """Return an estimate of the peak of a pass without statistics.

        Args:
            names: The targets that are observed in it.
            checkpoint: Whether blocks keep only their inputs.

        Returns:
            Bytes. Gradients and temporaries are taken to be two tensors like the largest that is
            saved in the tail, three like that of a block.
        """
        wanted = set(names)
        kept = [0] * (len(self.blocks) + 1)
        for item in self.kept:
            if wanted & item.targets:
                kept[item.place] += item.size
        outside = kept.pop()
        inside = [saved + more for saved, more in zip(self.blocks, kept, strict=True)]
        resting = sum(self.entries) if checkpoint else sum(inside)
        busy = max(inside, default=0) if checkpoint else 0
        busy += 3 * self.widest_block + self.working
        return self.front + outside + resting + max(self.tail + 2 * self.widest_tail, busy)


class _Once:
    """Tells storages apart while they are alive; addresses of dead ones are given out again."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._alive: dict[int, tuple[Any, int]] = {}
        for index, tensor in enumerate(known):
            self.add(tensor, -1 - index)

    def find(self, tensor: Tensor) -> int | None:
        """Return the mark of a tensor's storage, or None if it is new."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def add(self, tensor: Tensor, mark: int) -> None:
        """Mark a tensor's storage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._alive[key] = (weakref.ref(storage, lambda _: self._alive.pop(key, None)), mark)


class _Scales:
    """Takes down what is saved, and where."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self._saved, self._entered, self._kept = (_Once(known) for _ in range(3))
        self._place = _OUTSIDE
        self.front = self.tail = self.widest_tail = self.widest_block = self.working = 0
        self.blocks: list[int] = []
        self.entries: list[int] = []
        self.kept: list[tuple[int, int, set[str]]] = []

    def enter(self, _block: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a block begins, and its inputs."""
        # What was taken for the tail came before this block.
        self.front += self.tail
        self.tail = self.widest_tail = 0
        self._place = len(self.blocks)
        self.blocks.append(0)
        self.entries.append(0)
        for tensor in _tensors((args, kwargs)):
            if self._entered.find(tensor) is None and self._saved.find(tensor) is None:
                self._entered.add(tensor, 0)
                self.entries[-1] += tensor.untyped_storage().nbytes()

    def leave(self, *_: Any) -> None:
        """Note that a block ends."""
        self._place = _OUTSIDE

    def save(self, tensor: Tensor) -> None:
        """Note a tensor that autograd would save."""
        if self._saved.find(tensor) is not None:
            return
        size = tensor.untyped_storage().nbytes()
        self._saved.add(tensor, 0)
        if self._place == _OUTSIDE:
            self.tail += size
            self.widest_tail = max(self.widest_tail, size)
        else:
            self.blocks[self._place] += size
            self.widest_block = max(self.widest_block, size)

    def keep(self, target: Target, kept: Iterable[Kept]) -> None:
        """Note what probes would keep for a target."""
        for tensor in _tensors(list(kept)):
            mark = self._kept.find(tensor)
            if mark is not None and mark >= 0:
                self.kept[mark][2].add(target.name)
            elif mark is None and self._saved.find(tensor) is None:
                self._kept.add(tensor, len(self.kept))
                size = tensor.untyped_storage().nbytes()
                self.kept.append((size, self._place, {target.name}))
            rows = tensor.shape[0]
            # A float32 copy of the output gradient, and of the input if it is kept as it is.
            copied = target.d_in if tensor.shape[-1] == target.d_in else 0
            copied = 0 if tensor.dtype == torch.float32 else copied
            self.working = max(self.working, FLOAT * rows * (target.d_out + copied))


class _Weigher(Observer):
    """An observer that only takes down what its probes would keep."""

    def __init__(self, sites: Sequence[Site], probes: Sequence[Probe], scales: _Scales) -> None:
        super().__init__(sites, probes)
        self._scales = scales

    def _grad_hook(self, target: Target, kept: list[Kept]) -> Callable[[Tensor], None]:
        self._scales.keep(target, kept)
        return lambda _grad: None


def weigh(
    model: nn.Module,
    sites: Sequence[Site],
    probes: Sequence[Probe],
    loss: Callable[[], Tensor],
    batch: Any,
    seed: int | None = 0,
) -> PassMemory:
    """Weigh a pass over a micro-batch.

    Args:
        model: The model; handed back as it was found.
        sites: The targets and their modules.
        probes: What would look at them; they see inputs, and no output gradient.
        loss: Runs the model forward and returns the loss.
        batch: The micro-batch, whose own tensors do not count.
        seed: Seed of the random state; None: the model is frozen and quiet already.

    Returns:
        What the pass holds, with and without checkpointing.
    """
    scales = _Scales([*model.parameters(), *model.buffers(), *_tensors(batch)])

    def refuse(_: Any) -> Tensor:
        raise AssertionError("a pass that is weighed goes forward only")

    def save(tensor: Tensor) -> None:
        scales.save(tensor)

    with ExitStack() as stack:
        stack.enter_context(not_checkpointed(model))
        if seed is not None:
            stack.enter_context(untouched(model, seed))
        for block in repeated_blocks(model):
            before = block.register_forward_pre_hook(scales.enter, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(block.register_forward_hook(scales.leave, always_call=True).remove)
        stack.enter_context(_Weigher(sites, probes, scales))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(save, refuse))
        with torch.enable_grad():
            loss()
    return PassMemory(
        front=scales.front,
        tail=scales.tail,
        blocks=tuple(scales.blocks),
        entries=tuple(scales.entries),
        kept=tuple(KeptInput(size, place, frozenset(names)) for size, place, names in scales.kept),
        widest_tail=scales.widest_tail,
        widest_block=scales.widest_block,
        working=scales.working,
    )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
