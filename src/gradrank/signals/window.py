"""A sliding window over the mini-batches of training, observed while they train the model."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradrank.core.errors import MeasurementError
from gradrank.core.targets import Target
from gradrank.ops.sketch import fold, prime_at_least, random_signs, seed_of
from gradrank.ops.spectrum import gram_matrix
from gradrank.signals.distributed import all_or_none, is_distributed, merge_across_processes
from gradrank.signals.layers import Site
from gradrank.signals.measure import Spectrum
from gradrank.signals.measurement import Measurement
from gradrank.signals.observe import Observer
from gradrank.signals.spectrum import DenseProbe, SketchProbe, SpectrumStatistic

# Rows of the one-sided sketch: twice what one decision may grow a target by, and some to spare.
DIRECTION_ROWS = 17


class DirectionProbe:
    """One-sided sketches ``Uᵀ G = (ΔU)ᵀ X`` of the gradient, summed over mini-batches.

    Their right singular directions are those of the mean gradient, as far as ``rows`` show them.
    """

    def __init__(self, targets: Sequence[Target], rows: int, seed: int) -> None:
        self._size = prime_at_least(rows)
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
        """Add ``(ΔU)ᵀ X``, ``[k, d_in]``, to the target's sum."""
        signs = self._signs[target.name] = self._signs[target.name].to(delta.device)
        part = fold(delta, signs, self._size).T @ kept.float()
        previous = self.sums.get(target.name)
        self.sums[target.name] = part if previous is None else previous.add_(part)


class Window:
    """The last mini-batches of training: their sketched gradients, while they are still recent.

    A mini-batch is one optimizer step of one process, all of its micro-batches together.

    Attributes:
        targets: The targets, in model order.
        dropped: Mini-batches left out because a gradient was NaN or infinite.
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
        self._rows: deque[dict[str, Tensor]] = deque(maxlen=size)
        self._observer: Observer | None = None
        self._reached: set[str] = set()
        self.dropped = 0

    def open(self) -> None:
        """Install the hooks for the coming mini-batch; nothing happens if they are there."""
        if self._observer is None:
            probes = [self._probe, *([self._directions] if self._directions else [])]
            self._observer = Observer(self._sites, probes).__enter__()

    def close(self) -> None:
        """Remove the hooks; safe to call twice."""
        if self._observer is not None:
            self._reached |= self._observer.reached
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
        try:
            rows = self._probe.take_batch(step)
        except MeasurementError:
            self.dropped += 1
            return False
        self._rows.append(rows)
        return True

    def measurement(self) -> Measurement:
        """Return the measurement of the window, of all processes together.

        Returns:
            The measurement; the window goes on with the mini-batches it has.
        """
        return merge_across_processes(all_or_none(self._own))

    def _own(self) -> Measurement:
        """The measurement of this process's mini-batches."""
        if not self._rows:
            raise MeasurementError(
                f"none of the observed mini-batches has a finite gradient ({self.dropped} left "
                "out), so that there is nothing to decide by. Lower the learning rate, or train "
                "in bfloat16 or float32."
            )
        rows = {t.name: torch.stack([row[t.name] for row in self._rows]) for t in self.targets}
        grams = {name: gram_matrix(row) for name, row in rows.items()}
        sketched = self._signal.estimator == "sketch"
        statistic = SpectrumStatistic(grams, rows if sketched else {})
        info = {
            "signals": ["spectrum"],
            "estimator": self._signal.estimator,
            "sketch_dim": self._signal.sketch_dim if sketched else None,
            "seed": self._seed,
            "unreached": [t.name for t in self.targets if t.name not in self._seen()],
        }
        return Measurement(self.targets, statistic, None, info)

    def directions(self) -> Mapping[str, Tensor]:
        """Return the one-sided sketches of the mean gradient and start new ones.

        Returns:
            Per target ``[k, d_in]`` float32, summed over mini-batches and processes; empty
            unless asked for.
        """
        if self._directions is None:
            return {}
        sums, self._directions.sums = self._directions.sums, {}
        if is_distributed():
            for target in self.targets:
                size = prime_at_least(DIRECTION_ROWS)
                known = sums.get(target.name)
                part = torch.zeros(min(size, target.d_out), target.d_in) if known is None else known
                dist.all_reduce(part)
                sums[target.name] = part
        return sums

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs of the window.

        Returns:
            ``rows/NAME`` ``[n, D]`` and ``directions/NAME``.
        """
        saved: dict[str, Tensor] = {}
        if self._rows:
            for target in self.targets:
                stacked = torch.stack([row[target.name] for row in self._rows])
                saved[f"rows/{target.name}"] = stacked
        sums = self._directions.sums if self._directions else {}
        return saved | {f"directions/{name}": tensor for name, tensor in sums.items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned.

        Args:
            saved: Tensors by key.

        Raises:
            MeasurementError: If they belong to other targets.
        """
        names = {target.name for target in self.targets}
        rows = {k.removeprefix("rows/"): t for k, t in saved.items() if k.startswith("rows/")}
        if rows and set(rows) != names:
            raise MeasurementError("the saved window belongs to other targets than this run's.")
        self._rows.clear()
        for index in range(next((int(t.shape[0]) for t in rows.values()), 0)):
            self._rows.append({name: tensor[index].clone() for name, tensor in rows.items()})
        if self._directions is not None:
            device = {site.target.name: _device(site) for site in self._sites}
            self._directions.sums = {
                name: tensor.to(device[name])
                for key, tensor in saved.items()
                if (name := key.removeprefix("directions/")) != key and name in names
            }

    def _seen(self) -> set[str]:
        return self._reached | (self._observer.reached if self._observer else set())


def _device(site: Site) -> Any:
    return next((p.device for p in site.module.parameters()), torch.device("cpu"))
