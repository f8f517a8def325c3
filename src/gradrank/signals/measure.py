"""Run mini-batches through a model and gather statistics of its gradients."""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradrank.core.errors import MeasurementError
from gradrank.core.targets import Target
from gradrank.signals.blocks import checkpointed, checkpoints_itself, repeated_blocks
from gradrank.signals.layers import Site, unwrapped
from gradrank.signals.loss import count_items, inner_model, model_loss, sizes, to_device
from gradrank.signals.mean_gradient import MeanGradientProbe, MeanGradientStatistic
from gradrank.signals.measurement import Measurement
from gradrank.signals.observe import Observer, Probe
from gradrank.signals.requests import (
    ESTIMATORS,
    MAX_SKETCH,
    SIGNALS,
    MeanGradient,
    Signal,
    Spectrum,
)
from gradrank.signals.scheme import Cap, Scheme, scheme_of
from gradrank.signals.spectrum import DenseProbe, SketchProbe, SpectrumStatistic
from gradrank.signals.untouched import untouched
from gradrank.signals.weigh import weigh

# What is asked for and how it is taken are one subject to those who call.
__all__ = [
    "ESTIMATORS",
    "MAX_SKETCH",
    "SIGNALS",
    "BatchProbe",
    "LossFunction",
    "MeanGradient",
    "Progress",
    "Signal",
    "Spectrum",
    "probe_for",
    "run",
    "scheme_for",
]

LossFunction = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[int, int], None]


class _Joins(Protocol):
    def join(self, more: Self) -> None: ...


T = TypeVar("T", bound=_Joins)


class BatchProbe(Probe, Protocol):
    """A probe that works through mini-batches and ends with a statistic."""

    def end_batch(self, batch: int) -> None:
        """Close a mini-batch."""
        ...

    def finish(self) -> Any:
        """Return the statistic."""
        ...


def scheme_for(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Sequence[Any]],
    signals: Sequence[Signal],
    loss_function: LossFunction | None = None,
    checkpoint: bool | None = None,
    max_memory: int | None = None,
) -> Scheme:
    """Decide how mini-batches are measured.

    With a cap, the largest micro-batch goes through the model once, forward, and what a backward
    pass would need is weighed.

    Args:
        model: The model.
        sites: The targets and their modules.
        batches: Mini-batches, each a sequence of micro-batches.
        signals: What to measure.
        loss_function: As for :func:`run`.
        checkpoint: Whether to checkpoint the model's blocks; None: only if the cap asks for it.
        max_memory: Cap in bytes, or None.

    Returns:
        The scheme.
    """
    targets = [site.target for site in sites]
    if max_memory is None or not batches:
        return scheme_of(targets, signals, len(batches), checkpoint)
    model = unwrapped(model)
    device = _device_of(model)
    largest = max((micro for group in batches for micro in group), key=_numbers)
    micro = to_device(largest, device)
    probes = [probe_for(signal, targets, 0) for signal in signals]
    loss = loss_function or model_loss
    cap = Cap(
        limit=max_memory,
        memory=weigh(model, sites, probes, lambda: loss(model, micro), micro),
        on_host=device.type == "cpu",
        can_checkpoint=bool(repeated_blocks(model)),
    )
    own = checkpoints_itself(model)
    return scheme_of(targets, signals, len(batches), True if own else checkpoint, cap)


def run(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Sequence[Any]],
    signals: Sequence[Signal],
    seed: int,
    loss_function: LossFunction | None = None,
    progress: Progress | None = None,
    scheme: Scheme | None = None,
) -> Measurement:
    """Measure the given mini-batches.

    Args:
        model: The model, plain or wrapped by PEFT; handed back as it was found.
        sites: The targets and their modules.
        batches: Mini-batches, each a sequence of micro-batches whose gradients add up to that
            of the whole (their losses are weighted by their numbers of labelled items).
        signals: What to measure.
        seed: Seed of the sketches and of the random state while measuring.
        loss_function: ``(model, micro_batch) -> scalar loss``, the mean over its items; default:
            the model's own loss.
        progress: Called with (batches done, batches in all), those of all passes.
        scheme: In which passes; default: one for all sketches, and one per block of dense
            gradients.

    Returns:
        The measurement.

    Raises:
        MeasurementError: For no batches, a loss without gradient, or NaN or infinity.
    """
    if not batches:
        raise MeasurementError("there is no batch to measure. Give at least two mini-batches.")
    # DistributedDataParallel would wait for gradients of weights, and none are computed here.
    model = unwrapped(model)
    targets = [site.target for site in sites]
    scheme = scheme or scheme_of(targets, signals, len(batches))
    steps = _Steps(model, loss_function or model_loss, progress, len(scheme.passes) * len(batches))
    started = time.perf_counter()
    found = _Found()
    recomputing = checkpointed(model) if scheme.checkpoint else contextlib.nullcontext()
    with untouched(model, seed), recomputing:
        for one in scheme.passes:
            names = {target.name for target in one.targets}
            chosen = [site for site in sites if site.target.name in names]
            probes = [probe_for(signal, one.targets, seed) for signal in one.signals]
            with Observer(chosen, probes) as observer:
                steps.take(batches, probes, observer, whole=len(names) == len(targets))
            found.add(probes, observer.reached)
    if not found.reached:
        raise MeasurementError(_reaches_nothing("any batch"))
    info = {
        **_describe(model, signals, seed),
        "seconds": time.perf_counter() - started,
        "examples": steps.examples,
        "tokens": steps.tokens,
        "passes": len(scheme.passes),
        "checkpointed": scheme.checkpoint or checkpoints_itself(model),
        "predicted_memory": scheme.predicted,
        "unreached": [target.name for target in targets if target.name not in found.reached],
    }
    return Measurement(tuple(targets), found.spectrum, found.mean_gradient, info)


def probe_for(signal: Signal, targets: Sequence[Target], seed: int) -> BatchProbe:
    """Return the probe of a signal.

    Args:
        signal: What is measured.
        targets: The targets that it looks at.
        seed: Seed of the sketches.

    Returns:
        The probe.
    """
    if isinstance(signal, MeanGradient):
        return MeanGradientProbe(targets, signal.directions, seed, signal.rows)
    if signal.estimator == "sketch":
        return SketchProbe(targets, signal.sketch_dim, seed)
    return DenseProbe(targets)


@dataclass
class _Found:
    """Statistics of the passes so far, joined over blocks of targets in model order."""

    spectrum: SpectrumStatistic | None = None
    mean_gradient: MeanGradientStatistic | None = None
    reached: set[str] = field(default_factory=set)

    def add(self, probes: Iterable[BatchProbe], reached: set[str]) -> None:
        self.reached |= reached
        for probe in probes:
            part = probe.finish()
            if isinstance(part, MeanGradientStatistic):
                self.mean_gradient = _joined(self.mean_gradient, part)
            else:
                self.spectrum = _joined(self.spectrum, part)


def _joined(first: T | None, second: T) -> T:
    if first is None:
        return second
    first.join(second)
    return first


class _Steps:
    """Forward and backward passes, with what they count."""

    def __init__(
        self, model: nn.Module, loss_function: LossFunction, progress: Progress | None, total: int
    ) -> None:
        self._model = model
        self._loss_function = loss_function
        self._progress = progress
        self._total = total
        self._done = 0
        self.examples = 0
        self.tokens = 0

    def take(
        self,
        batches: Sequence[Sequence[Any]],
        probes: Iterable[BatchProbe],
        observer: Observer,
        whole: bool,
    ) -> None:
        self.examples = self.tokens = 0
        for index, micro_batches in enumerate(batches):
            shares = _shares([count_items(self._model, micro) for micro in micro_batches])
            for micro, share in zip(micro_batches, shares, strict=True):
                self._step(micro, share, index, whole)
            if whole and not observer.reached:
                raise MeasurementError(_reaches_nothing(f"batch {index}"))
            for probe in probes:
                probe.end_batch(index)
            self._done += 1
            if self._progress:
                self._progress(self._done, self._total)

    def _step(self, micro: Any, share: float, index: int, whole: bool) -> None:
        micro = to_device(micro, _device_of(self._model))
        with torch.enable_grad():
            loss = self._loss_function(self._model, micro)
            _check_loss(loss, index, whole)
            # In a pass over a block of targets, the loss may touch none of this block.
            if loss.requires_grad:
                (loss * share).backward()
        examples, tokens = sizes(micro)
        self.examples += examples
        self.tokens += tokens


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _numbers(batch: Any) -> int:
    """How many numbers a micro-batch holds, as far as its tensors tell."""
    values = batch.values() if hasattr(batch, "values") else batch
    leaves = tree_leaves(list(values) if isinstance(values, Iterable) else values)
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))


def _describe(model: nn.Module, signals: Sequence[Signal], seed: int) -> dict[str, Any]:
    spectrum = next((s for s in signals if isinstance(s, Spectrum)), None)
    mean = next((s for s in signals if isinstance(s, MeanGradient)), None)
    inner = inner_model(model)
    return {
        "model": type(inner).__name__,
        "signals": [*(["spectrum"] if spectrum else []), *(["mean-gradient"] if mean else [])],
        "estimator": spectrum.estimator if spectrum else "sketch",
        "sketch_dim": spectrum.sketch_dim if spectrum else None,
        "directions": mean.directions if mean else None,
        "rows": mean.rows if mean else None,
        "seed": seed,
    }


def _shares(items: Sequence[int]) -> list[float]:
    total = sum(items)
    return [count / total for count in items]


def _reaches_nothing(batch: str) -> str:
    return (
        f"the loss of {batch} reaches no target: no output gradient arrived at any of them. Check "
        "that the targets are used in the forward pass and that the loss is not computed under "
        "no_grad."
    )


def _check_loss(loss: Any, index: int, whole: bool) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise MeasurementError(f"the loss of batch {index} is no scalar tensor: {type(loss)}.")
    if not bool(torch.isfinite(loss)):
        raise MeasurementError(
            f"the loss of batch {index} is {float(loss.detach())}. Look at that batch (all labels "
            "ignored, a sequence that is too long?), or measure in float32 or bfloat16."
        )
    if whole and not loss.requires_grad:
        raise MeasurementError(
            f"the loss of batch {index} has no gradient: no target has a part in it. Check the "
            "targets and that the loss is not computed under no_grad or from detached outputs."
        )
