"""Bring the measurements of several processes together, without pickle.

What travels is the sketches, some kilobytes per target and batch; every process ends with the
same merged measurement.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gradrank.core.errors import MeasurementError
from gradrank.signals.mean_gradient import EVEN, ODD, MeanGradientStatistic, from_sketches
from gradrank.signals.measurement import Measurement, merge
from gradrank.signals.spectrum import SpectrumStatistic

T = TypeVar("T")


def is_distributed() -> bool:
    """Tell whether a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_or_none(work: Callable[[], T]) -> T:
    """Do some work in every process; if it fails in one, fail in all instead of hanging.

    Args:
        work: The work, without collective calls inside.

    Returns:
        Its result.

    Raises:
        MeasurementError: If it failed in another process.
    """
    if not is_distributed():
        return work()
    failure: BaseException | None = None
    result = None
    try:
        result = work()
    except Exception as error:
        failure = error
    failed = torch.tensor([float(failure is not None)], device=_device())
    dist.all_reduce(failed)
    if failure is not None:
        raise failure
    if failed.item():
        raise MeasurementError(
            f"{int(failed.item())} other process(es) could not measure; see their messages."
        )
    return result  # pyright: ignore[reportReturnType]


def of_first_process(numbers: Sequence[int]) -> list[int]:
    """Return the first process's whole numbers in all processes.

    Args:
        numbers: This process's, equally many in all.

    Returns:
        The first process's; the same numbers if there is only one process.
    """
    if not is_distributed():
        return list(numbers)
    sent = torch.tensor(list(numbers), device=_device())
    dist.broadcast(sent, 0)
    return sent.tolist()


def merge_across_processes(measurement: Measurement) -> Measurement:
    """Return the measurement of all processes' batches, the same in every process.

    Batch i of process p is taken to have come i-th in turn, as distributed samplers deal them
    out, so that two processes with N batches equal one process with 2 N.

    Args:
        measurement: This process's measurement; all processes must use the same settings.

    Returns:
        The merged measurement, or the same one if there is only one process.

    Raises:
        MeasurementError: If the measurement is dense.
    """
    if not is_distributed():
        return measurement
    if measurement.info.get("estimator") == "dense" and measurement.spectrum is not None:
        raise MeasurementError(
            "estimator='dense' works in one process only: the gradients would have to travel. "
            "Use estimator='sketch'."
        )
    world = dist.get_world_size()
    counts = _gather(torch.tensor([[measurement.batches]], dtype=torch.float64))
    sizes = [int(count.item()) for count in counts]
    extra = _gather(
        torch.tensor(
            [[float(measurement.info.get(key) or 0) for key in ("examples", "tokens")]],
            dtype=torch.float64,
        )
    )
    spectra = _spectra(measurement.spectrum, sizes) if measurement.spectrum else [None] * world
    means = (
        _mean_gradients(measurement.mean_gradient) if measurement.mean_gradient else [None] * world
    )
    parts = [
        Measurement(
            measurement.targets,
            spectrum,
            mean,
            {**measurement.info, "examples": int(row[0, 0]), "tokens": int(row[0, 1])},
        )
        for spectrum, mean, row in zip(spectra, means, extra, strict=True)
    ]
    return merge(parts, interleave=True)


def _spectra(statistic: SpectrumStatistic, sizes: list[int]) -> list[SpectrumStatistic]:
    most = max(sizes)
    padded = [
        torch.nn.functional.pad(rows, (0, 0, 0, most - rows.shape[0]))
        for rows in statistic.rows.values()
    ]
    gathered = _gather(torch.cat(padded, dim=1))
    widths = [rows.shape[1] for rows in statistic.rows.values()]
    parts = []
    for size, flat in zip(sizes, gathered, strict=True):
        pieces = flat[:size].split(widths, dim=1)
        rows = dict(zip(statistic.rows, (piece.contiguous() for piece in pieces), strict=True))
        # Gram matrices are formed once, for the merged batches.
        gram = {name: torch.zeros(size, size, dtype=torch.float64) for name in rows}
        parts.append(SpectrumStatistic(gram, rows))
    return parts


def _mean_gradients(statistic: MeanGradientStatistic) -> list[MeanGradientStatistic]:
    world = dist.get_world_size()
    sums: list[dict[str, dict[str, tuple[Tensor, Tensor]]]] = [
        {EVEN: {}, ODD: {}} for _ in range(world)
    ]
    for half in (EVEN, ODD):
        for name, (y, w) in statistic.sketches[half].items():
            flat = torch.cat([y.cpu().reshape(-1), w.cpu().reshape(-1)])[None]
            for rank, row in enumerate(_gather(flat)):
                first, second = row[0].split([y.numel(), w.numel()])
                sums[rank][half][name] = (first.reshape(y.shape), second.reshape(w.shape))
    counts = _gather(torch.tensor([[float(statistic.counts[half]) for half in (EVEN, ODD)]]))
    return [
        from_sketches(part, {EVEN: int(row[0, 0]), ODD: int(row[0, 1])}, statistic.seed)
        for part, row in zip(sums, counts, strict=True)
    ]


def _gather(tensor: Tensor) -> list[Tensor]:
    """Gather equally shaped tensors from all processes, in order of their ranks, on the CPU."""
    local = tensor.to(_device()).contiguous()
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local)
    return [part.cpu() for part in parts]


def _device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
