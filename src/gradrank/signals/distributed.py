"""Bring the measurements of several processes together, without pickle, and count what travels.

Of spectra it is the sketches, 4 KB per target and batch; of mean gradients two sketches per
target, whatever the number of batches. Every process ends with the same merged measurement.

All collective calls of this package on data go through this module, which counts their bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gradrank.core.errors import MeasurementError
from gradrank.signals.mean_gradient import EVEN, ODD, MeanGradientStatistic, from_sketches
from gradrank.signals.measurement import Measurement, merge
from gradrank.signals.spectrum import SpectrumStatistic

T = TypeVar("T")

# Tensors travel together, up to this many bytes in one call.
BUCKET_BYTES = 64 << 20


class _Traffic:
    """Bytes that this process has put into collective calls."""

    bytes = 0

    @classmethod
    def count(cls, tensor: Tensor) -> None:
        cls.bytes += tensor.numel() * tensor.element_size()


def bytes_exchanged() -> int:
    """Return the bytes that this process has put into this package's collective calls so far.

    The payload of each call counts once: the tensor that a process adds to a sum, hands to all
    others, or has in common with them after a broadcast. With two processes that is what crosses
    in either direction; with more, the backend decides how often a payload is passed on.
    Gradients that DistributedDataParallel averages, and shards that FSDP gathers, are not counted.
    """
    return _Traffic.bytes


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
    failed = torch.tensor([float(failure is not None)])
    sum_over_processes([failed])
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
    sent = torch.tensor(list(numbers))
    broadcast_in_place([sent])
    return sent.tolist()


@torch.no_grad()
def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all processes, equal to the last bit in all of them.

    Args:
        tensors: Of equal shapes and dtypes, in the same order, in all processes.
    """
    _in_buckets(tensors, dist.all_reduce)


@torch.no_grad()
def broadcast_in_place(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by those of the first process.

    Args:
        tensors: Of equal shapes and dtypes, in the same order, in all processes.
    """
    _in_buckets(tensors, lambda flat: dist.broadcast(flat, 0))


def gather(tensor: Tensor) -> list[Tensor]:
    """Gather equally shaped tensors from all processes.

    Args:
        tensor: This process's, ``[...]``.

    Returns:
        Those of all processes in order of their ranks, on the CPU.
    """
    local = tensor.to(_device()).contiguous()
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    _Traffic.count(local)
    dist.all_gather(parts, local)
    return [part.cpu() for part in parts]


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
    extra = gather(
        torch.tensor(
            [
                measurement.batches,
                *(float(measurement.info.get(key) or 0) for key in ("examples", "tokens")),
            ],
            dtype=torch.float64,
        )
    )
    rows = [[int(number) for number in found.tolist()] for found in extra]
    sizes = [size for size, _, _ in rows]
    spectra = _spectra(measurement.spectrum, sizes) if measurement.spectrum else [None] * len(sizes)
    parts = [
        Measurement(
            measurement.targets,
            spectrum,
            None,
            {**measurement.info, "examples": examples, "tokens": tokens},
        )
        for spectrum, (_, examples, tokens) in zip(spectra, rows, strict=True)
    ]
    merged = merge(parts, interleave=True)
    if measurement.mean_gradient is None:
        return merged
    keep_rows = bool(measurement.info.get("rows"))
    return replace(merged, mean_gradient=_mean_gradient(measurement.mean_gradient, keep_rows))


def _spectra(statistic: SpectrumStatistic, sizes: list[int]) -> list[SpectrumStatistic]:
    most = max(sizes)
    padded = [
        torch.nn.functional.pad(rows, (0, 0, 0, most - rows.shape[0]))
        for rows in statistic.rows.values()
    ]
    gathered = gather(torch.cat(padded, dim=1))
    widths = [rows.shape[1] for rows in statistic.rows.values()]
    parts = []
    for size, flat in zip(sizes, gathered, strict=True):
        pieces = flat[:size].split(widths, dim=1)
        rows = dict(zip(statistic.rows, (piece.contiguous() for piece in pieces), strict=True))
        # Gram matrices are formed once, for the merged batches.
        gram = {name: torch.zeros(size, size, dtype=torch.float64) for name in rows}
        parts.append(SpectrumStatistic(gram, rows))
    return parts


def _mean_gradient(statistic: MeanGradientStatistic, rows: bool) -> MeanGradientStatistic:
    """Sketches of sums add up, so the sums travel and not each process's own."""
    halves = (EVEN, ODD)
    sums = {
        half: {name: (y.clone(), w.clone()) for name, (y, w) in statistic.sketches[half].items()}
        for half in halves
    }
    counts = torch.tensor([float(statistic.counts[half]) for half in halves])
    pairs = [pair for half in halves for pair in sums[half].values()]
    sum_over_processes([counts, *(sketch for pair in pairs for sketch in pair)])
    known = {half: int(count) for half, count in zip(halves, counts.tolist(), strict=True)}
    return from_sketches(sums, known, statistic.seed, rows)


def _in_buckets(tensors: Sequence[Tensor], call: Callable[[Tensor], object]) -> None:
    """Make a collective call on tensors, many of one dtype and device together, in place."""
    kinds: dict[tuple[str, str], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            kinds.setdefault((str(tensor.dtype), tensor.device.type), []).append(tensor)
    for _, alike in sorted(kinds.items()):
        for bucket in _buckets(alike):
            home = bucket[0].device
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            sent = flat.to(_device()) if home.type == "cpu" else flat
            _Traffic.count(sent)
            call(sent)
            parts = sent.to(home).split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a sequence of tensors of one dtype where a bucket is full; none is empty."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and held + size > BUCKET_BYTES:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += size
    if bucket:
        yield bucket


def _device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
