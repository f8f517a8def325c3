"""One of two gloo processes: runs every check and writes what it found as JSON.

Started by test_two_processes.py as ``worker.py RANK FOLDER``; collective calls happen in the same
order in both processes, whatever a check raises.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradrank as gr
from cases import CASES, batches

WORLD = 2
CASE = CASES["llama"]
DATA = batches(CASE, 8)
BOTH = [gr.Spectrum(sketch_dim=8), gr.MeanGradient(8)]


def mine(rank: int, data: list[Any]) -> list[Any]:
    """Dealt round-robin, as a distributed sampler does."""
    return data[rank::WORLD]


def numbers(measurement: gr.Measurement) -> dict[str, Any]:
    return {
        "gram": {t.name: measurement.gram(t.name).tolist() for t in measurement.targets},
        "mean": {
            name: values.tolist()
            for name, values in measurement.need_mean_gradient().values["whole"].items()
        },
        "counts": measurement.need_mean_gradient().counts,
        "info": {k: v for k, v in measurement.info.items() if k != "seconds"},
    }


def plan_gard(rank: int) -> Any:
    return gr.plan(CASE.model(), mine(rank, DATA), "gard", "uniform:3", num_batches=4).to_dict()


def plan_waterfill(rank: int) -> Any:
    data = mine(rank, DATA)
    return gr.plan(CASE.model(), data, "waterfill", "uniform:3", num_batches=4).to_dict()


def plan_hybrid(rank: int) -> Any:
    data = mine(rank, DATA)
    return gr.plan(CASE.model(), data, "hybrid", "uniform:3", num_batches=4).to_dict()


def rows(rank: int) -> Any:
    signal = gr.MeanGradient(8, rows=True)
    found = gr.measure(CASE.model(), mine(rank, DATA), signal, num_batches=4)
    kept = found.need_mean_gradient().rows
    return {
        part: {name: (factors @ factors.T).tolist() for name, factors in named.items()}
        for part, named in kept.items()
    }


def even(rank: int) -> Any:
    return numbers(gr.measure(CASE.model(), mine(rank, DATA), BOTH, num_batches=4))


def uneven(rank: int) -> Any:
    return numbers(gr.measure(CASE.model(), mine(rank, DATA[:5]), BOTH, num_batches=4))


def wrapped(rank: int) -> Any:
    """Measure through DistributedDataParallel, then train: the processes must stay in step.

    Its forward broadcasts buffers, so that uneven numbers of batches would wait for ever.
    """
    torch.manual_seed(0)
    model = CASE.model().train()
    parallel = DistributedDataParallel(model)
    found = numbers(gr.measure(parallel, mine(rank, DATA[:5]), BOTH, num_batches=4))
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for batch in mine(rank, DATA)[:2]:
        parallel(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found["weight"] = model.lm_head.weight.tolist()
    return found


def dense(rank: int) -> Any:
    return numbers(gr.measure(CASE.model(), mine(rank, DATA), gr.Spectrum("dense"), num_batches=4))


def no_data(rank: int) -> Any:
    data = DATA[:2] if rank == 0 else []
    return numbers(gr.measure(CASE.model(), data, num_batches=2))


def broken_data(rank: int) -> Any:
    def stream() -> Iterator[Any]:
        yield DATA[0]
        if rank == 1:
            raise OSError("the disk is gone")
        yield DATA[1]

    return numbers(gr.measure(CASE.model(), stream(), num_batches=2))


def nan_loss(rank: int) -> Any:
    data = [dict(batch) for batch in DATA[:2]]
    if rank == 1:
        data[1]["labels"] = torch.full_like(data[1]["labels"], -100)
    return numbers(gr.measure(CASE.model(), data, num_batches=2))


def after_errors(rank: int) -> Any:
    return even(rank)


CHECKS: tuple[Callable[[int], Any], ...] = (
    plan_gard,
    plan_waterfill,
    plan_hybrid,
    rows,
    even,
    uneven,
    wrapped,
    dense,
    no_data,
    broken_data,
    nan_loss,
    after_errors,
)


def main() -> None:
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=100),
    )
    found: dict[str, Any] = {}
    for check in CHECKS:
        try:
            found[check.__name__] = {"value": check(rank)}
        except Exception as error:
            found[check.__name__] = {
                "error": f"{type(error).__name__}: {error}",
                "trace": f"[rank {rank}] {traceback.format_exc()}",
            }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
