"""Run mini-batches through a model and gather statistics of its gradients."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradrank.core.errors import MeasurementError, OptionError, nearest
from gradrank.core.targets import Target
from gradrank.signals.layers import Site, unwrapped
from gradrank.signals.loss import count_items, inner_model, model_loss, sizes, to_device
from gradrank.signals.mean_gradient import MeanGradientProbe
from gradrank.signals.measurement import Measurement
from gradrank.signals.observe import Observer, Probe
from gradrank.signals.spectrum import DenseProbe, SketchProbe, SpectrumStatistic
from gradrank.signals.untouched import untouched

LossFunction = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[int, int], None]

ESTIMATORS = ("sketch", "dense")
MAX_SKETCH = 4096


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Request for the spectrum over batches (GARD).

    Attributes:
        estimator: ``sketch`` (default) or ``dense`` (exact, several passes over the batches).
        sketch_dim: Sketch size k on either side.
        max_bytes: Cap on the gradients that ``dense`` holds at once.
    """

    estimator: str = "sketch"
    sketch_dim: int = 128
    max_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            hint = nearest(self.estimator, ESTIMATORS)
            raise OptionError(f"estimator '{self.estimator}' is unknown. {hint}")
        if not 1 <= self.sketch_dim <= MAX_SKETCH:
            raise OptionError(f"sketch_dim is {self.sketch_dim}; it must lie in 1..{MAX_SKETCH}.")


@dataclass(frozen=True, slots=True)
class MeanGradient:
    """Request for the singular values of the mean gradient (water-filling).

    Attributes:
        directions: How many leading directions to resolve.
        rows: Whether to keep row factors too, ``4 k`` bytes per output row for all batches and
            for each half of them: what partitions of output neurons are priced by.
    """

    directions: int = 40
    rows: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.directions <= MAX_SKETCH:
            raise OptionError(f"directions is {self.directions}; it must lie in 1..{MAX_SKETCH}.")


Signal = Spectrum | MeanGradient
SIGNALS: dict[str, Callable[[], Signal]] = {"spectrum": Spectrum, "mean-gradient": MeanGradient}


class BatchProbe(Probe, Protocol):
    """A probe that works through mini-batches and ends with a statistic."""

    def end_batch(self, batch: int) -> None:
        """Close a mini-batch."""
        ...

    def finish(self) -> Any:
        """Return the statistic."""
        ...


def run(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Sequence[Any]],
    signals: Sequence[Signal],
    seed: int,
    loss_function: LossFunction | None = None,
    progress: Progress | None = None,
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
        progress: Called with (batches done, batches in all).

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
    passes = _passes(targets, signals, seed, len(batches))
    steps = _Steps(model, loss_function or model_loss, progress, len(passes) * len(batches))
    started = time.perf_counter()
    spectrum: SpectrumStatistic | None = None
    mean = None
    reached: set[str] = set()
    with untouched(model, seed):
        for names, probes in passes:
            chosen = [site for site in sites if site.target.name in names]
            with Observer(chosen, list(probes.values())) as observer:
                steps.take(batches, probes.values(), observer, whole=len(names) == len(targets))
            reached |= observer.reached
            for kind, probe in probes.items():
                part = probe.finish()
                if kind == "mean-gradient":
                    mean = part
                elif spectrum is None:
                    spectrum = part
                else:
                    spectrum.gram.update(part.gram)
    if not reached:
        raise MeasurementError(_reaches_nothing("any batch"))
    if spectrum is not None:
        spectrum.gram = {target.name: spectrum.gram[target.name] for target in targets}
    info = {
        **_describe(model, signals, seed),
        "seconds": time.perf_counter() - started,
        "examples": steps.examples,
        "tokens": steps.tokens,
        "unreached": [target.name for target in targets if target.name not in reached],
    }
    return Measurement(tuple(targets), spectrum, mean, info)


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
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        micro = to_device(micro, device)
        with torch.enable_grad():
            loss = self._loss_function(self._model, micro)
            _check_loss(loss, index, whole)
            # In a pass over a block of targets, the loss may touch none of this block.
            if loss.requires_grad:
                (loss * share).backward()
        examples, tokens = sizes(micro)
        self.examples += examples
        self.tokens += tokens


def _passes(
    targets: Sequence[Target], signals: Sequence[Signal], seed: int, batches: int
) -> list[tuple[set[str], dict[str, BatchProbe]]]:
    """Plan the passes over the batches: one for sketches, one per block of dense gradients."""
    names = {target.name for target in targets}
    together: dict[str, BatchProbe] = {}
    passes: list[tuple[set[str], dict[str, BatchProbe]]] = []
    for signal in signals:
        if isinstance(signal, MeanGradient):
            together["mean-gradient"] = MeanGradientProbe(
                targets, signal.directions, seed, signal.rows
            )
        elif signal.estimator == "sketch":
            together["spectrum"] = SketchProbe(targets, signal.sketch_dim, seed)
        else:
            blocks = dense_blocks(targets, signal, batches)
            passes.extend(
                ({target.name for target in block}, {"spectrum": DenseProbe(block)})
                for block in blocks
            )
    return [(names, together), *passes] if together else passes


def dense_blocks(targets: Sequence[Target], signal: Spectrum, batches: int) -> list[list[Target]]:
    """Return the blocks of targets whose dense gradients are kept at once, one pass for each.

    Args:
        targets: The targets.
        signal: The request, with its ``max_bytes``; a single target may exceed them.
        batches: Mini-batches M.

    Returns:
        The blocks, in model order.
    """
    # Float32 gradients of all mini-batches, and one more while a block is joined.
    limit = signal.max_bytes // (4 * (batches + 1))
    blocks: list[list[Target]] = [[]]
    used = 0
    for target in targets:
        size = target.d_in * target.d_out
        if blocks[-1] and used + size > limit:
            blocks.append([])
            used = 0
        blocks[-1].append(target)
        used += size
    return blocks


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
