"""A sliding window over the mini-batches of training, observed while they train the model."""

import contextlib
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradrank.core.errors import MeasurementError
from gradrank.core.targets import Target
from gradrank.ops.sketch import fold, prime_at_least, random_signs, seed_of
from gradrank.ops.spectrum import gram_matrix
from gradrank.signals.distributed import (
    all_or_none,
    is_distributed,
    merge_across_processes,
    sum_over_processes,
)
from gradrank.signals.layers import Site
from gradrank.signals.measure import Spectrum
from gradrank.signals.measurement import Measurement
from gradrank.signals.observe import Observer
from gradrank.signals.spectrum import STORED_WIDTH, DenseProbe, SketchProbe, SpectrumStatistic

# Rows of the one-sided sketch: twice what one decision may grow a target by, and some to spare.
DIRECTION_ROWS = 17


class DirectionProbe:
    """One-sided sketches ``Uᵀ G = (ΔU)ᵀ X`` of the gradient, summed over mini-batches.

    Their right singular directions are those of the mean gradient, as far as ``rows`` show them.

    Attributes:
        sums: Per target ``[min(k, d_out), d_in]`` float32, over the mini-batches that were kept.
    """

    def __init__(self, targets: Sequence[Target], rows: int, seed: int) -> None:
        self._size = prime_at_least(rows)
        self._current: dict[str, Tensor] = {}
        self._signs = {
            t.name: random_signs(t.d_out, seed_of(seed, "direction", t.name)) for t in targets
        }
        self.sums: dict[str, Tensor] = {}

    def share_key(self, target: Target) -> object:
        """Inputs are kept as they are, so one reference serves all."""
        return target.d_in

    def on_input(self, target: Target, x: Tensor) -> Tensor:
        """Return the input itself, ``[T, d_in]``; LoRA's own backward pass keeps it anyway."""
        return x

    def on_output_grad(self, target: Target, kept: Tensor, delta: Tensor) -> None:
        """Add ``(ΔU)ᵀ X``, ``[k, d_in]``, to that of the mini-batch."""
        signs = self._signs[target.name] = self._signs[target.name].to(delta.device)
        part = fold(delta, signs, self._size).T @ kept.float()
        _add(self._current, target.name, part)

    def end_batch(self, keep: bool) -> None:
        """Close a mini-batch: add it to the sums, or forget it."""
        current, self._current = self._current, {}
        for name, part in current.items() if keep else ():
            _add(self.sums, name, part)

    def shape(self, target: Target) -> tuple[int, int]:
        """Return the shape of a target's sum."""
        return min(self._size, target.d_out), target.d_in


class Window:
    """The last mini-batches of training: their sketched gradients, while they are still recent.

    A mini-batch is one optimizer step of one process, all of its micro-batches together. One whose
    gradient is NaN or infinite keeps its place, so that nothing older than ``size`` observed
    steps is ever decided by, but it is left out of the measurement.

    Attributes:
        targets: The targets, in model order.
        dropped: Mini-batches left out so far, over the whole run.
    """

    def __init__(
        self, sites: Sequence[Site], signal: Spectrum, size: int, seed: int, directions: bool
    ) -> None:
        """Prepare; nothing is observed before :meth:`open`.

        Args:
            sites: The targets and their modules.
            signal: Estimator and sketch size.
            size: Mini-batches that the window holds.
            seed: Seed of the sketches.
            directions: Whether gradient directions to grow into are gathered too.
        """
        self._sites, self._signal, self._seed = list(sites), signal, seed
        self.targets = tuple(site.target for site in sites)
        sketched = signal.estimator == "sketch"
        self._probe: SketchProbe | DenseProbe = (
            SketchProbe(self.targets, signal.sketch_dim, seed)
            if sketched
            else DenseProbe(self.targets)
        )
        self._directions = (
            DirectionProbe(self.targets, DIRECTION_ROWS, seed) if directions else None
        )
        # None stands for a mini-batch that was left out: the window slides over it all the same.
        self._rows: deque[dict[str, Tensor] | None] = deque(maxlen=size)
        self._observer: Observer | None = None
        self._reached: set[str] = set()
        self.dropped = 0

    def open(self) -> None:
        """Install the hooks for the coming mini-batch; nothing happens if they are there."""
        if self._observer is None:
            # A backward pass after the last close may have left something.
            with contextlib.suppress(MeasurementError):
                self._probe.take_batch(0)
            if self._directions is not None:
                self._directions.end_batch(keep=False)
            probes = [self._probe, *([self._directions] if self._directions else [])]
            self._observer = Observer(self._sites, probes).__enter__()

    def close(self) -> None:
        """Remove the hooks; safe to call twice."""
        if self._observer is not None:
            self._observer.close()
            self._observer = None

    @property
    def is_open(self) -> bool:
        """Whether the hooks are installed."""
        return self._observer is not None

    def end_step(self, step: int) -> bool:
        """Close a mini-batch after its optimizer step.

        Args:
            step: The step, for messages.

        Returns:
            Whether it was kept; a gradient that overflowed (float16) is left out.

        Raises:
            MeasurementError: If no output gradient arrived at any target.
        """
        if self._observer is None or not self._observer.reached:
            raise MeasurementError(
                f"no output gradient arrived at any of the {len(self.targets)} targets in step "
                f"{step}. Check that the model that is trained is the one that was given, that "
                "its base layers are called (a model compiled beforehand does not see new "
                "hooks), and that the step made a backward pass."
            )
        self._reached |= self._observer.reached
        self._observer.reached.clear()
        rows = self._take(step)
        self._rows.append(rows)
        self.dropped += rows is None
        return rows is not None

    def _take(self, step: int) -> dict[str, Tensor] | None:
        """Take what the probes hold of a mini-batch; None if it is NaN or infinite."""
        try:
            rows = self._probe.take_batch(step)
        except MeasurementError:
            rows = None
        if self._directions is not None:
            self._directions.end_batch(keep=rows is not None)
        return rows

    def measurement(self) -> Measurement:
        """Return the measurement of the window, of all processes together.

        Returns:
            The measurement; the window goes on with the mini-batches it has.
        """
        return merge_across_processes(all_or_none(self._own))

    def _own(self) -> Measurement:
        """The measurement of this process's mini-batches."""
        kept = self._kept()
        if not kept:
            raise MeasurementError(
                f"none of the observed mini-batches has a finite gradient ({self.dropped} left "
                "out), so that there is nothing to decide by. Lower the learning rate, or train "
                "in bfloat16 or float32."
            )
        rows = {t.name: torch.stack([row[t.name] for row in kept]) for t in self.targets}
        grams = {name: gram_matrix(row) for name, row in rows.items()}
        sketched = self._signal.estimator == "sketch"
        statistic = SpectrumStatistic(grams, rows if sketched else {})
        info = {
            "signals": ["spectrum"],
            "estimator": self._signal.estimator,
            "sketch_dim": self._signal.sketch_dim if sketched else None,
            "seed": self._seed,
            "unreached": [t.name for t in self.targets if t.name not in self._reached],
        }
        return Measurement(self.targets, statistic, None, info)

    def directions(self, names: Collection[str] | None = None) -> Mapping[str, Tensor]:
        """Return the one-sided sketches of the mean gradient and start new ones.

        Args:
            names: Targets whose sketches are wanted, the same in all processes; None: all.

        Returns:
            Per target ``[k, d_in]`` float32, summed over mini-batches and processes; empty
            if the window gathers none.
        """
        if self._directions is None:
            return {}
        sums, self._directions.sums = self._directions.sums, {}
        wanted = [s for s in self._sites if names is None or s.target.name in names]
        if not is_distributed():
            return {s.target.name: sums[s.target.name] for s in wanted if s.target.name in sums}
        found: dict[str, Tensor] = {}
        for site in wanted:
            part = sums.get(site.target.name)
            shape = self._directions.shape(site.target)
            none = part is None
            found[site.target.name] = torch.zeros(shape, device=_device(site)) if none else part
        sum_over_processes(list(found.values()))
        return found

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs of the window.

        Returns:
            ``kept`` ``[n]`` (whether each mini-batch of the window was), ``rows/NAME`` ``[m, D]``
            of those that were, ``dropped``, and ``directions/NAME``.
        """
        saved = {
            "kept": torch.tensor([row is not None for row in self._rows], dtype=torch.bool),
            "dropped": torch.tensor([self.dropped]),
        }
        if kept := self._kept():
            for target in self.targets:
                saved[f"rows/{target.name}"] = torch.stack([row[target.name] for row in kept])
        sums = self._directions.sums if self._directions else {}
        return saved | {f"directions/{name}": tensor.clone() for name, tensor in sums.items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned.

        Args:
            saved: Tensors by key.

        Raises:
            MeasurementError: If they belong to other targets, or do not fit together.
        """
        flags = saved["kept"].reshape(-1).bool().tolist() if "kept" in saved else []
        count = sum(flags)
        shapes = {f"rows/{t.name}": (count, self._width(t)) for t in self.targets if count}
        if self._directions is not None:
            found = {t.name: self._directions.shape(t) for t in self.targets}
            keys = {f"directions/{name}": shape for name, shape in found.items()}
            shapes |= {key: shape for key, shape in keys.items() if key in saved}
        tensors = {key for key in saved if key.startswith(("rows/", "directions/"))}
        if tensors != set(shapes) or any(tuple(saved[k].shape) != shapes[k] for k in shapes):
            raise MeasurementError(
                "the saved window does not fit this run: it has other targets, another estimator "
                "or another sketch, or it is damaged. Resume with the settings of that run."
            )
        index = iter(range(count))
        self._rows.clear()
        self._rows.extend(self._row(saved, next(index)) if kept else None for kept in flags)
        self.dropped = int(saved["dropped"].sum()) if "dropped" in saved else 0
        if self._directions is not None:
            self._directions.sums = {
                site.target.name: saved[key].to(_device(site), copy=True)
                for site in self._sites
                if (key := f"directions/{site.target.name}") in saved
            }

    def _kept(self) -> list[dict[str, Tensor]]:
        return [row for row in self._rows if row is not None]

    def _row(self, saved: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        return {t.name: saved[f"rows/{t.name}"][index].clone() for t in self.targets}

    def _width(self, target: Target) -> int:
        """Length of a target's row."""
        if isinstance(self._probe, SketchProbe):
            size = self._probe.size
            return min(min(target.d_in, size) * min(target.d_out, size), STORED_WIDTH)
        return target.d_in * target.d_out


def _device(site: Site) -> Any:
    return next((p.device for p in site.module.parameters()), torch.device("cpu"))


def _add(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    previous = sums.get(name)
    sums[name] = part if previous is None else previous.add_(part)
