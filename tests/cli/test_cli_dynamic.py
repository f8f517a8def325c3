"""``gradrank train --method gard-dynamic``: moves, records, resumes after SIGKILL."""

import json
import signal
import time
from pathlib import Path

from safetensors.torch import load_file

from cli.cli_cases import TINY, invoke
from gradrank.record import RunRecord
from launching import COMMAND, start

# Enough tokens for effective ranks that differ; the ranks move at most of the decisions.
OPTIONS = ("interval=3", "window=6", "energy=0.5", "beta=0")
MOVING = (
    *TINY,
    *("--method", "gard-dynamic", "--budget", "uniform:4", "--steps", "14", "--lr", "1e-2"),
    *("--eval-batches", "2"),
    *(part for option in OPTIONS for part in ("--option", option)),
)


def test_ranks_move_and_are_recorded(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke("train", *MOVING, "--out", out)
    assert result.exit_code == 0, result.stderr
    record = RunRecord.load(out / "record.json")
    assert [decision["step"] for decision in record.decisions] == [3, 6, 9, 12]
    assert sum(decision["moved"] for decision in record.decisions) > 0
    assert all(d["parameters"] <= d["budget"] for d in record.decisions)
    assert record.ranks_over_time[0] == [0, ranks_of(record)]
    assert len(record.ranks_over_time) > 1
    assert record.trainable_parameters["final"] == record.decisions[-1]["parameters"]
    last = record.ranks_over_time[-1][1]
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    for name, rank in last.items():
        assert weights[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank
    assert "parameters moved in 4 decisions" in result.stdout
    assert "How capacity moved" in (out / "report.html").read_text()


def ranks_of(record: RunRecord) -> dict[str, int]:
    assert record.plan is not None
    return {name: target["rank"] for name, target in record.plan["targets"].items()}


def test_a_run_that_is_killed_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert invoke("train", *MOVING, "--out", whole).exit_code == 0
    options = map(str, (*MOVING, "--checkpoint-every", "1", "--out", killed))
    process = start(COMMAND, "train", *options)
    reached = killed / "checkpoints" / "checkpoint-7" / "complete.json"
    while not reached.exists() and process.code is None:
        time.sleep(0.01)
    process.kill()
    assert process.code == -signal.SIGKILL, process.stderr
    assert not (killed / "record.json").exists()
    result = invoke("train", "--out", killed, "--resume")
    assert result.exit_code == 0, result.stderr
    first, second = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, killed)
    )
    assert first.keys() == second.keys()
    assert all(bool((first[key] == second[key]).all()) for key in first)
    histories = [
        json.loads((f / "record.json").read_text())["ranks_over_time"] for f in (whole, killed)
    ]
    assert histories[0] == histories[1]


def test_a_schedule_that_never_decides_is_refused_before_training(tmp_path: Path) -> None:
    out = tmp_path / "run"
    few = ("--method", "gard-dynamic", "--budget", "uniform:4", "--steps", "4")
    result = invoke("train", *TINY, *few, "--out", out)
    assert result.exit_code == 2
    assert "would never move any capacity" in result.stderr
    assert "interval 50" in result.stderr
    assert not out.exists()
