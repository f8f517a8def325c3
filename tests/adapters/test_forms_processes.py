"""Forms under DDP and FSDP2 in two gloo processes. Run as a script, this file is one process."""

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
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adapters.forms_cases import KINDS, formed, lora_layers, trainable
from cases import CASES, batches
from gradrank.adapters import forms
from gradrank.adapters.baking import gathered
from gradrank.core.errors import TargetError
from launching import run_ranks

pytestmark = pytest.mark.dist

DATA = batches(CASES["llama"], 2)
TIMEOUT = 120
FULL = StateDictOptions(full_state_dict=True)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The adapter as a save would write it, gathered."""
    return {n: gathered(t).clone() for n, t in get_peft_model_state_dict(model).items()}


def train(model: nn.Module, caller: nn.Module, data: list[dict[str, Tensor]], kind: str) -> None:
    """Two steps; under a mask the number of active components changes after each."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for step in range(2):
        (sum(caller(**batch).loss for batch in data) / len(data)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in lora_layers(model) if kind == "mask" else []:
            forms.set_active(layer, "default", 5 - 2 * step)


def farthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def check(rank: int, kind: str) -> dict[str, Any]:
    mine = [DATA[rank]]
    alone = formed(kind)
    train(alone, alone, DATA, kind)
    wanted = whole(alone)

    replicated = formed(kind)
    train(replicated, DistributedDataParallel(replicated), mine, kind)
    found = {"ddp": farthest(whole(replicated), wanted)}

    sharded = formed(kind)
    for block in sharded.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    train(sharded, sharded, mine, kind)
    found["fsdp2"] = farthest(whole(sharded), wanted)
    full = get_model_state_dict(sharded, options=FULL)
    found["parametrized"] = sum("parametrizations" in name for name in full)

    saved = [
        {n: gathered(t).clone() for n, t in forms.raw_tensors(layer, "default").items()}
        for layer in lora_layers(sharded)
    ]
    train(sharded, sharded, mine, "again")
    for layer, tensors in zip(lora_layers(sharded), saved, strict=True):
        forms.load_raw_tensors(layer, "default", tensors)
    found["raw"] = farthest(whole(sharded), wanted)
    train(sharded, sharded, mine, "again")
    set_peft_model_state_dict(sharded, {name: tensor.clone() for name, tensor in wanted.items()})
    found["loaded"] = farthest(whole(sharded), wanted)
    for change in (forms.detach, lambda layer, name: forms.attach_mask(layer, name, 1)):
        try:
            change(lora_layers(sharded)[0], "default")
        except TargetError as error:
            found.setdefault("refused", []).append(str(error))  # pyright: ignore
    return found


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
    found: dict[str, Any] = {}
    for kind in KINDS:
        try:
            found[kind] = check(rank, kind)
        except Exception:
            found[kind] = {"error": traceback.format_exc()[-3000:]}
            break  # the other process waits in a collective, and gives up by itself
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("forms")
    run_ranks(__file__, str(folder), seconds=TIMEOUT)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_save_and_load_as_one(reports: list[dict[str, Any]], kind: str) -> None:
    for report in reports:
        found = report[kind]
        assert "error" not in found, found["error"]
        assert found["ddp"] < 1e-6
        assert found["fsdp2"] < 1e-6
        assert found["raw"] < 1e-6
        assert found["loaded"] == 0
        assert found["parametrized"] == 0
        assert len(found["refused"]) == 2
        assert "sharded" in found["refused"][0]


if __name__ == "__main__":
    main()
