"""How a measurement is taken: in how many passes over the batches, with checkpointing or not.

A cap on memory is met in this order: everything in one pass; that with checkpointing; blocks of
targets, one pass for each, with checkpointing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from gradrank.core.bytesize import spoken_bytes
from gradrank.core.errors import MeasurementError
from gradrank.core.targets import Target
from gradrank.signals.distributed import is_distributed, sum_over_processes
from gradrank.signals.held import dense_blocks, statistics_bytes
from gradrank.signals.requests import Signal, Spectrum
from gradrank.signals.weigh import PassMemory

# Per cent. On the shape of an 8-billion Llama, checkpointed, estimates were 3 % low.
_MARGIN = 5


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over all batches.

    Attributes:
        targets: The targets that are looked at.
        signals: What is measured of them.
    """

    targets: tuple[Target, ...]
    signals: tuple[Signal, ...]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a measurement is taken.

    Attributes:
        passes: The passes, in turn.
        checkpoint: Whether the model's blocks are computed again in the backward pass.
        predicted: Estimate of the most that is held beyond the model, in bytes; None if nothing
            asked for one.
    """

    passes: tuple[Pass, ...]
    checkpoint: bool = False
    predicted: int | None = None


@dataclass(frozen=True, slots=True)
class Cap:
    """A limit on memory, and what has to be known to keep it.

    Attributes:
        limit: Bytes beyond the model and its batches, on the model's device.
        memory: What the largest micro-batch takes.
        on_host: Whether the model is in the host's memory.
        can_checkpoint: Whether the model has blocks to checkpoint.
    """

    limit: int
    memory: PassMemory
    on_host: bool
    can_checkpoint: bool

    def need(self, one: Pass, batches: int, checkpoint: bool) -> int:
        """Return an estimate of what a pass takes, in bytes.

        Args:
            one: The pass.
            batches: Mini-batches M.
            checkpoint: Whether blocks are checkpointed.

        Returns:
            Activations, what probes keep, and statistics.
        """
        held = statistics_bytes(one.targets, one.signals, batches, self.on_host)
        return held + self.activations(one.targets, checkpoint)

    def activations(self, targets: Sequence[Target], checkpoint: bool) -> int:
        """Return an estimate of a pass without statistics, with the margin, in bytes.

        Args:
            targets: The targets of the pass.
            checkpoint: Whether blocks are checkpointed.
        """
        found = self.memory.activations([target.name for target in targets], checkpoint)
        return found * (100 + _MARGIN) // 100


def scheme_of(
    targets: Sequence[Target],
    signals: Sequence[Signal],
    batches: int,
    checkpoint: bool | None = None,
    cap: Cap | None = None,
) -> Scheme:
    """Decide how a measurement is taken.

    Args:
        targets: The targets.
        signals: What is measured.
        batches: Mini-batches M.
        checkpoint: Whether to checkpoint; None: only if the cap asks for it.
        cap: The cap, or None.

    Returns:
        The scheme. Without a cap: one pass for all sketches, and one per block of dense gradients.
    """
    plain = Scheme(_uncapped(targets, signals, batches), bool(checkpoint))
    if cap is None:
        return plain
    choices = [checkpoint] if checkpoint is not None else [False, *([True] * cap.can_checkpoint)]
    for chosen in choices:
        most = max(cap.need(one, batches, chosen) for one in plain.passes)
        if most <= cap.limit:
            return Scheme(plain.passes, chosen, most)
    chosen = choices[-1]
    passes: list[Pass] = []
    for one in plain.passes:
        passes += _streamed(one, batches, chosen, cap)
    return Scheme(tuple(passes), chosen, max(cap.need(one, batches, chosen) for one in passes))


def agreed(scheme: Scheme) -> Scheme:
    """Return a scheme that suits all processes, the same in each of them.

    Args:
        scheme: This process's; all have the same targets and signals.

    Returns:
        Checkpointed if any process asked for that, and cut wherever any process cuts, so that
        passes only get smaller.
    """
    if not is_distributed():
        return scheme
    order: list[tuple[tuple[Signal, ...], Target]] = []
    starts: list[float] = []
    for one in scheme.passes:
        order += [(one.signals, target) for target in one.targets]
        starts += [1.0, *[0.0] * (len(one.targets) - 1)]
    votes = torch.tensor([float(scheme.checkpoint), *starts])
    sum_over_processes([votes])
    checkpoint, *cuts = votes.tolist()
    passes: list[Pass] = []
    for (signals, target), cut in zip(order, cuts, strict=True):
        if cut:
            passes.append(Pass((target,), signals))
        else:
            passes[-1] = Pass((*passes[-1].targets, target), signals)
    return replace(scheme, passes=tuple(passes), checkpoint=bool(checkpoint))


def _uncapped(
    targets: Sequence[Target], signals: Sequence[Signal], batches: int
) -> tuple[Pass, ...]:
    dense = [s for s in signals if isinstance(s, Spectrum) and s.estimator == "dense"]
    sketched = tuple(signal for signal in signals if signal not in dense)
    passes = [Pass(tuple(targets), sketched)] if sketched else []
    for signal in dense:
        blocks = dense_blocks(targets, signal, batches)
        passes += [Pass(tuple(block), (signal,)) for block in blocks]
    return tuple(passes)


def _streamed(one: Pass, batches: int, checkpoint: bool, cap: Cap) -> list[Pass]:
    """Cut a pass into as few as the cap allows, in model order."""

    def fits(targets: Sequence[Target]) -> bool:
        return cap.need(Pass(tuple(targets), one.signals), batches, checkpoint) <= cap.limit

    passes: list[Pass] = []
    rest = list(one.targets)
    while rest:
        count = _most(rest, fits)
        if not count:
            raise MeasurementError(_too_little(rest[0], one.signals, batches, checkpoint, cap))
        passes.append(Pass(tuple(rest[:count]), one.signals))
        rest = rest[count:]
    return passes


def _most(targets: Sequence[Target], fits: Callable[[Sequence[Target]], bool]) -> int:
    """Return how many targets from the start fit; more of them never need less."""
    low, high = 0, len(targets)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(targets[:middle]) else (low, middle - 1)
    return low


def _too_little(
    target: Target, signals: Sequence[Signal], batches: int, checkpoint: bool, cap: Cap
) -> str:
    held = statistics_bytes([target], signals, batches, cap.on_host)
    activations = cap.activations([target], checkpoint)
    way = "with" if checkpoint else "without"
    allow = ", allow checkpointing" if cap.can_checkpoint and not checkpoint else ""
    return (
        f"'{target.name}' alone takes about {spoken_bytes(held + activations)} to measure, "
        f"activations {spoken_bytes(activations)} ({way} checkpointing) and statistics "
        f"{spoken_bytes(held)}, and max_memory is {spoken_bytes(cap.limit)}. Measure smaller "
        f"micro-batches (fewer examples or tokens in each, more of them accumulated){allow}, or "
        "raise max_memory."
    )
