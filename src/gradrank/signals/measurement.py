"""Measurements: what the hooks gathered, per target, with where it came from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gradrank.core.errors import MeasurementError
from gradrank.core.files import write_atomic
from gradrank.core.notebooks import notebook_html
from gradrank.core.targets import Target
from gradrank.core.text import parse_json
from gradrank.ops.sketch import seed_of
from gradrank.ops.spectrum import effective_rank, eigenvalues, entropy_rank, stable_rank
from gradrank.signals.integrity import check_parts
from gradrank.signals.mean_gradient import EVEN, ODD, WHOLE, MeanGradientStatistic
from gradrank.signals.spectrum import SpectrumStatistic

SCHEMA = "gradrank.measurement/1"
# What reading a file of unknown origin can raise.
_DAMAGE = (
    SafetensorError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


@dataclass(frozen=True)
class Measurement:
    """Statistics of mini-batch gradients, one per target.

    Attributes:
        targets: The targets, in model order.
        spectrum: Gram matrices over batches, or None if not measured.
        mean_gradient: Singular values of the mean gradients (and row factors, if asked for), or
            None if not measured.
        info: Provenance, plain data: model, estimator, sketch size, seed, batches, examples,
            tokens, seconds, base parameters, targets that no gradient reached.
    """

    targets: tuple[Target, ...]
    spectrum: SpectrumStatistic | None = None
    mean_gradient: MeanGradientStatistic | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batches(self) -> int:
        """Number of mini-batches M."""
        statistic = self.spectrum or self.mean_gradient
        return statistic.batches if statistic else 0

    def gram(self, name: str) -> Tensor:
        """Return the Gram matrix of one target, ``[M, M]`` float64, not centred.

        Args:
            name: Name of the target.

        Returns:
            The matrix, in squared loss per squared weight.
        """
        return self.need_spectrum().gram[name]

    def need_spectrum(self) -> SpectrumStatistic:
        """Return the spectrum statistic.

        Returns:
            The statistic.

        Raises:
            MeasurementError: If it was not measured.
        """
        if self.spectrum is None:
            raise MeasurementError(_missing("spectrum"))
        return self.spectrum

    def need_mean_gradient(self) -> MeanGradientStatistic:
        """Return the mean-gradient statistic.

        Returns:
            The statistic.

        Raises:
            MeasurementError: If it was not measured.
        """
        if self.mean_gradient is None:
            raise MeasurementError(_missing("mean-gradient"))
        return self.mean_gradient

    def halves(self, splits: int) -> "list[tuple[Measurement, Measurement]]":
        """Return pairs of measurements that each saw half of the batches.

        Args:
            splits: How many random splits to draw. A mean gradient knows only one split, even
                against odd batches; then that one is returned.

        Returns:
            The pairs; empty for fewer than two batches.
        """
        if self.batches < 2:
            return []
        if self.mean_gradient is not None:
            index = range(self.batches)
            return [(self._part(EVEN, index[0::2]), self._part(ODD, index[1::2]))]
        pairs = []
        for split in range(splits):
            generator = torch.Generator().manual_seed(seed_of("split", split))
            order = torch.randperm(self.batches, generator=generator).tolist()
            middle = self.batches // 2
            pairs.append((self._part(EVEN, order[:middle]), self._part(ODD, order[middle:])))
        return pairs

    def _part(self, half: str, indices: Sequence[int]) -> "Measurement":
        spectrum = self.spectrum.subset(indices) if self.spectrum else None
        mean = self.mean_gradient.half(half) if self.mean_gradient else None
        return replace(self, spectrum=spectrum, mean_gradient=mean)

    def summary(self, energy: float = 0.9) -> dict[str, Any]:
        """Return the measurement as plain data, for records and reports.

        Args:
            energy: Threshold α of the effective rank.

        Returns:
            ``info`` and, per target, eigenvalues, the three ranks, the energy (trace of the
            Gram matrix) and the singular values of the mean gradient, as far as measured.
        """
        rows: dict[str, dict[str, Any]] = {target.name: {} for target in self.targets}
        if self.spectrum is not None:
            names = list(self.spectrum.gram)
            grams = torch.stack([self.spectrum.gram[name] for name in names])
            values = eigenvalues(grams)
            ranks = zip(
                effective_rank(values, energy).tolist(),
                entropy_rank(values).tolist(),
                stable_rank(values).tolist(),
                strict=True,
            )
            for name, spectrum, (effective, entropy, stable) in zip(
                names, values, ranks, strict=True
            ):
                rows[name] |= {
                    "eigenvalues": spectrum.tolist(),
                    "effective_rank": effective,
                    "entropy_rank": entropy,
                    "stable_rank": stable,
                    "energy": float(spectrum.sum()),
                }
        if self.mean_gradient is not None:
            for name, singular in self.mean_gradient.values[WHOLE].items():
                rows[name]["singular_values"] = singular.tolist()
        return {**self.info, "batches": self.batches, "energy_threshold": energy, "targets": rows}

    def save(self, path: str | Path, overwrite: bool = False, sketches: bool = False) -> None:
        """Write ``measurement.safetensors`` (tensors, and JSON in its header).

        Args:
            path: The file.
            overwrite: Whether an existing file may be replaced.
            sketches: Whether to keep the sketched gradients, without which the measurement
                cannot be merged with others (about 4 KB per target and batch).
        """
        tensors: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        if self.spectrum is not None:
            saved = self.spectrum.tensors(sketches)
            tensors |= {f"spectrum/{key}": tensor for key, tensor in saved.items()}
        if self.mean_gradient is not None:
            saved = self.mean_gradient.tensors(sketches)
            tensors |= {f"mean-gradient/{key}": tensor for key, tensor in saved.items()}
            counts = self.mean_gradient.counts
        header = {
            "schema": SCHEMA,
            "targets": [[t.name, t.d_in, t.d_out, t.kind] for t in self.targets],
            "info": dict(self.info),
            "counts": counts,
        }
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        text = {"gradrank": json.dumps(header, allow_nan=False)}
        write_atomic(
            Path(path), lambda temporary: save_file(tensors, temporary, metadata=text), overwrite
        )

    @classmethod
    def load(cls, path: str | Path) -> "Measurement":
        """Read ``measurement.safetensors``.

        Args:
            path: The file.

        Returns:
            The measurement.

        Raises:
            MeasurementError: If the file is missing, damaged, or no measurement.
        """
        if Path(path).exists() and not Path(path).is_file():
            raise MeasurementError(f"measurement '{path}' is no ordinary file.")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = parse_json((file.metadata() or {}).get("gradrank", "{}"))
                if header.get("schema") != SCHEMA:
                    raise MeasurementError(f"'{path}' is no measurement (schema '{SCHEMA}').")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            measurement = cls._from_parts(header, tensors)
            check_parts(
                measurement.targets,
                measurement.spectrum,
                measurement.mean_gradient,
                measurement.info,
            )
        except FileNotFoundError as error:
            raise MeasurementError(f"measurement '{path}' does not exist.") from error
        except MeasurementError:
            raise
        except _DAMAGE as error:
            raise MeasurementError(f"measurement '{path}' is damaged: {error}.") from error
        return measurement

    def __repr__(self) -> str:
        known = {"spectrum": self.spectrum, "mean-gradient": self.mean_gradient}
        signals = " and ".join(name for name, one in known.items() if one is not None) or "nothing"
        return f"Measurement({signals} of {len(self.targets)} targets in {self.batches} batches)"

    def _repr_html_(self) -> str:
        return notebook_html("measurement_html", self.targets, self.summary())

    @classmethod
    def _from_parts(cls, header: Any, tensors: dict[str, Tensor]) -> "Measurement":
        targets = tuple(Target(str(n), int(i), int(o), str(k)) for n, i, o, k in header["targets"])
        parts: dict[str, dict[str, Tensor]] = {"spectrum": {}, "mean-gradient": {}}
        for key, tensor in tensors.items():
            part, _, rest = key.partition("/")
            parts[part][rest] = tensor
        spectrum = mean = None
        if parts["spectrum"]:
            spectrum = SpectrumStatistic.from_tensors(parts["spectrum"])
        if parts["mean-gradient"]:
            counts = {str(k): int(v) for k, v in header["counts"].items()}
            mean = MeanGradientStatistic.from_tensors(parts["mean-gradient"], counts)
        return cls(targets, spectrum, mean, dict(header["info"]))


def merge(parts: Sequence[Measurement], interleave: bool = False) -> Measurement:
    """Return one measurement of the batches of several.

    Args:
        parts: Measurements of the same targets with the same seed and sketch size.
        interleave: Whether batch i of part p came i-th in turn (the order of a distributed
            sampler) rather than part after part.

    Returns:
        The merged measurement.

    Raises:
        MeasurementError: If the parts do not fit together.
    """
    if not parts:
        raise MeasurementError("there is no measurement to merge.")
    first = parts[0]
    keys = ("estimator", "sketch_dim", "directions", "seed", "signals")
    rows = bool(first.info.get("rows"))
    for part in parts[1:]:
        if (
            bool(part.info.get("rows")) != rows
            or part.targets != first.targets
            or any(part.info.get(key) != first.info.get(key) for key in keys)
        ):
            raise MeasurementError(
                "measurements to be merged differ in targets, signals, estimator, sketch size, "
                "directions, row factors or seed. Measure them with the same settings."
            )
    spectrum = mean = None
    if first.spectrum is not None:
        order = _order([part.batches for part in parts], interleave)
        spectrum = SpectrumStatistic.merge([p.need_spectrum() for p in parts], order)
    if first.mean_gradient is not None:
        mean = MeanGradientStatistic.merge([p.need_mean_gradient() for p in parts], rows)
    info = dict(first.info)
    for key in ("examples", "tokens"):
        info[key] = sum(int(part.info.get(key) or 0) for part in parts)
    reached = [set(part.info.get("unreached", [])) for part in parts]
    info["unreached"] = sorted(set.intersection(*reached))
    return Measurement(first.targets, spectrum, mean, info)


def _order(counts: Sequence[int], interleave: bool) -> list[int]:
    """Positions of concatenated batches in the merged order."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    places = [(b, p) for p, count in enumerate(counts) for b in range(count)]
    places.sort(key=(lambda bp: bp) if interleave else (lambda bp: (bp[1], bp[0])))
    return [starts[p] + b for b, p in places]


def _missing(signal: str) -> str:
    return (
        f"this measurement has no '{signal}' signal, which the method needs. Measure again with "
        f"signal='{signal}', or choose the method before measuring."
    )
