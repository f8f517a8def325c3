"""The example with two processes, started by accelerate's own launcher."""

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
from gradrank.signals.facts import find_targets
from launching import accelerate_launch


@pytest.mark.dist
def test_two_processes_share_a_plan_and_move_ranks(tmp_path: Path) -> None:
    base = tiny(tmp_path / "llama", "llama")
    data = write_sentences(tmp_path / "sentences.jsonl")
    options = ["--model", base, "--data", data, "--steps", 5, "--interval", 2]
    said = accelerate_launch(
        EXAMPLES / "processes.py",
        *map(str, ["--cpu", *options, "--out", tmp_path / "out"]),
        seconds=240,
    )
    assert said.count("step 5 loss") == 1
    allowed = 4 * cost_of_rank_one(find_targets(AutoModelForCausalLM.from_pretrained(base)))
    assert len(set(ranks_on_disk(tmp_path / "out").values())) > 1
    assert parameters_on_disk(tmp_path / "out") <= allowed
    assert effect(base, tmp_path / "out") > 0
