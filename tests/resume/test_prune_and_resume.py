"""Killed before, between and after prunings, a run that prunes resumes bitwise."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launching import run
from resume.prune_worker import DUE, POINTS, STEPS

TIMEOUT = 280
NAMES = [
    pytest.param(name, f"{name}-{point}-{step}", id=f"{name}-{point}-{step}")
    for name, points in POINTS.items()
    for point, step in points
]
Runs = tuple[Path, dict[str, list[int]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("prunings")
    done = run(Path(__file__).with_name("prune_worker.py"), str(folder), seconds=TIMEOUT)
    assert done.code == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "ends.json").read_text())


def result(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    facts = json.loads((folder / f"{name}.json").read_text())
    return load_file(folder / f"{name}.safetensors"), facts


@pytest.mark.parametrize("name", POINTS)
def test_the_uninterrupted_run_prunes(runs: Runs, name: str) -> None:
    folder, ends = runs
    assert ends[f"{name}-whole"] == [0]
    tensors, facts = result(folder, f"{name}-whole")
    assert [decision["step"] for decision in facts["decisions"]] == DUE
    spent = [decision["parameters"] for decision in facts["decisions"]]
    assert facts["start_parameters"] > spent[0] > spent[1] >= spent[2]
    assert spent[2] <= facts["budget"]
    assert facts["step"] == STEPS
    assert any(key.startswith("state/course/mean/") for key in tensors)
    assert any(key.startswith("state/formed/") for key in tensors)


def test_some_targets_lost_their_adapter_before_a_kill(runs: Runs) -> None:
    """A resumed model is built anew, with all of its targets."""
    history = result(runs[0], "as-code-whole")[1]["ranks_over_time"]
    assert 0 in dict(history)[DUE[0]].values()


@pytest.mark.parametrize(("method", "name"), NAMES)
def test_a_killed_run_ends_as_the_uninterrupted_one(runs: Runs, method: str, name: str) -> None:
    folder, ends = runs
    assert ends[name] == [-signal.SIGKILL, 0]
    wanted, facts = result(folder, f"{method}-whole")
    found, history = result(folder, name)
    assert history == facts
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
