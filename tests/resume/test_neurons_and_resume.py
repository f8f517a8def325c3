"""Killed in the first stage, at the split or in the second stage, a run resumes bitwise."""

import json
import signal
from pathlib import Path

import pytest
import torch

from launching import run
from resume.prune_worker import NEURON_POINTS, STAGES, STEPS
from resume.test_prune_and_resume import TIMEOUT, Runs, result

NAMES = [
    pytest.param(name, f"{name}-{point}-{step}", id=f"{name}-{point}-{step}")
    for name, points in NEURON_POINTS.items()
    for point, step in points
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("splits")
    done = run(
        Path(__file__).with_name("prune_worker.py"), str(folder), *NEURON_POINTS, seconds=TIMEOUT
    )
    assert done.code == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "ends.json").read_text())


@pytest.mark.parametrize("name", NEURON_POINTS)
def test_the_uninterrupted_run_splits(runs: Runs, name: str) -> None:
    folder, ends = runs
    assert ends[f"{name}-whole"] == [0]
    tensors, facts = result(folder, f"{name}-whole")
    (entry,) = facts["decisions"]
    assert entry["step"] == STAGES["initial_steps"]
    assert entry["parameters"] <= facts["budget"] == facts["start_parameters"]
    assert facts["step"] == STEPS
    assert facts["neurons"]["looks"] == 2
    assert len({found["dominant_rows"] for found in facts["neurons"]["targets"].values()}) > 1
    assert any(key.startswith("state/course/hits/") for key in tensors)
    assert any(key.startswith("state/maps/after/") for key in tensors)


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
