"""Killed at any step, or in the middle of writing a checkpoint, a run resumes bitwise."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launching import run
from resume.kill_worker import POINTS

TIMEOUT = 280
NAMES = [f"{point}-{step}" for point, steps in POINTS.items() for step in steps]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("kills")
    done = run(Path(__file__).with_name("kill_worker.py"), str(folder), seconds=TIMEOUT)
    assert done.code == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "ends.json").read_text())


def result(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    facts = json.loads((folder / f"{name}.json").read_text())
    return load_file(folder / f"{name}.safetensors"), facts


def test_the_uninterrupted_run_moves_ranks(runs: tuple[Path, dict[str, list[int]]]) -> None:
    folder, ends = runs
    assert ends["whole"] == [0]
    facts = result(folder, "whole")[1]
    assert [decision["step"] for decision in facts["decisions"]] == [2, 4]
    assert all(decision["moved"] > 0 for decision in facts["decisions"])


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_ends_as_the_uninterrupted_one(
    runs: tuple[Path, dict[str, list[int]]], name: str
) -> None:
    folder, ends = runs
    assert ends[name] == [-signal.SIGKILL, 0]
    wanted, facts = result(folder, "whole")
    found, history = result(folder, name)
    assert history == facts
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
