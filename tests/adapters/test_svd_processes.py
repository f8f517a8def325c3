"""Components come and go under DDP in two gloo processes. Run as a script, this is one process."""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel

import gradrank as gr
from adapters.surgery_cases import distance, logits, sites, trainable
from adapters.svd_cases import started
from cases import CASES, batches, tiny_llama
from gradrank.adapters.edits import Select
from gradrank.adapters.reserve import restart, settle
from launching import run_ranks

pytestmark = pytest.mark.dist

DATA = batches(CASES["llama"], 2)
TIMEOUT = 120


def edits(model: Any, step: int, names: list[str]) -> dict[str, Any]:
    """Some lose components, one all of them; later some get new ones."""
    chosen: dict[str, Any] = {}
    for name, site in sites(model).items():
        i = names.index(name)
        if step:
            chosen[name] = gr.Grow(4) if i % 2 else gr.Shrink(min(site.rank, 1), "norm")
        elif i:
            chosen[name] = Select(((4, 1, 2), (0,), (3, 5))[i % 3])
        else:
            chosen[name] = Select(()) if site.masked else gr.Drop()
    return chosen


def run(model: Any, caller: Any, data: list[Any]) -> None:
    optimizer = torch.optim.Adam(trainable(model), lr=1e-2)
    names = list(sites(model))
    for step in range(4):
        (sum(caller(**batch).loss for batch in data) / len(data)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < 2:
            assert gr.edit(caller, edits(model, step, names), optimizer, seed=step).reset == ()
        elif step == 2:
            restart(caller, optimizer, seed=7)


def check(rank: int, folder: Path) -> dict[str, Any]:
    held = started(fixed=True)
    run(held, DistributedDataParallel(held), [DATA[rank]])
    apart = 0.0
    for parameter in held.parameters():
        both = [torch.empty_like(parameter) for _ in range(2)]
        dist.all_gather(both, parameter.detach().contiguous())
        apart = max(apart, distance(both[0], both[1]))
    before = logits(held)
    ranks = settle(held)
    held.save_pretrained(str(folder / f"adapter{rank}"))
    return {
        "apart": apart,
        "settled": distance(logits(held), before),
        "ranks": list(ranks.values()),
        "forms": sorted({site.form for site in sites(held).values()}),
    }


def main() -> None:
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    try:
        found = check(rank, folder)
    except Exception:
        found = {"error": traceback.format_exc()[-3000:]}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("svd")
    run_ranks(__file__, str(folder), seconds=TIMEOUT)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_prune_at_fixed_shapes_as_one_does_for_real(
    reports: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, found = reports
    alone = started()
    run(alone, alone, DATA)
    for rank, report in enumerate(found):
        assert "error" not in report, report["error"]
        assert report["apart"] == 0
        assert report["settled"] < 1e-6
        assert report["forms"] == ["plain"]
        assert report["ranks"][:4] == [0, 4, 1, 4]
        stock = PeftModel.from_pretrained(tiny_llama(), str(folder / f"adapter{rank}")).eval()
        assert [s.rank for s in sites(stock).values()] == report["ranks"][1:]
        assert distance(logits(stock), logits(alone)) < 1e-5


if __name__ == "__main__":
    main()
