"""The example with two processes, started by accelerate's own launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from examples.example_cases import (
    EXAMPLES,
    effect,
    parameters_on_disk,
    ranks_on_disk,
    tiny,
    write_sentences,
)
from gradrank.core.targets import cost_of_rank_one
from gradrank.session import find_targets

# Of accelerate's launchers the one that starts several processes without MPI.
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.dist
def test_two_processes_share_a_plan_and_move_ranks(tmp_path: Path) -> None:
    base = tiny(tmp_path / "llama", "llama")
    data = write_sentences(tmp_path / "sentences.jsonl")
    command = [sys.executable, "-m", *LAUNCH, str(EXAMPLES / "processes.py"), "--cpu"]
    command += ["--model", str(base), "--data", str(data), "--steps", "5", "--interval", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 5 loss") == 1
    allowed = 4 * cost_of_rank_one(find_targets(AutoModelForCausalLM.from_pretrained(base)))
    assert len(set(ranks_on_disk(tmp_path / "out").values())) > 1
    assert parameters_on_disk(tmp_path / "out") <= allowed
    assert effect(base, tmp_path / "out") > 0
