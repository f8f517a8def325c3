"""Our own baselines under the Trainer: evaluated whole, resumed to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gradrank as gr
from gradrank.core.budget import Budget
from gradrank.lab.baselines.arm import Built, Setting
from gradrank.lab.baselines.registry import create_baseline
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.encode import load_task_data
from gradrank.lab.evaluate import evaluate
from gradrank.lab.models import resolve_model
from gradrank.lab.train import TrainSettings, train
from gradrank.signals.facts import find_targets
from lab.baselines_ours_cases import same_weights

SETTINGS = TrainSettings(steps=6, batch_size=4, lr=1e-2, eval_every=2, save_every=2)
ARMS = {"milora": {}, "lora-dash": {"directions": 2, "prelaunch": 2}, "dylora": {}}


def built(name: str) -> tuple[Built, Any]:
    examples = read_examples(DataSpec("tiny-lm"))
    loaded = resolve_model("tiny-gpt2", examples.head, None, device="cpu", seed=0)
    targets = find_targets(loaded.model)

    def uniform(parameters: int) -> gr.Plan:
        return gr.allocate(targets, "uniform", Budget.parameters(parameters))

    torch.manual_seed(0)
    budget = 3 * sum(target.cost for target in targets)
    options = {"task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    setting = Setting(loaded.model, targets, budget, 2.0, SETTINGS.steps, 0, iter, uniform, options)
    return create_baseline(name, ARMS[name]).build(setting), load_task_data(examples, loaded, 16)


@pytest.mark.parametrize("name", list(ARMS))
def test_an_interrupted_run_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole, data = built(name)
    outcome = train(whole.model, data, SETTINGS, tmp_path / "whole", capacity=whole.capacity)
    assert outcome.status == "finished", outcome.message
    assert outcome.ranks_over_time == outcome.decisions == []

    cut, data = built(name)

    def stop(done: int, *_more: Any) -> None:
        if done == 5:
            raise KeyboardInterrupt

    first = train(cut.model, data, SETTINGS, tmp_path / "cut", stop, capacity=cut.capacity)
    assert first.status == "interrupted"
    again, data = built(name)
    second = train(
        again.model, data, SETTINGS, tmp_path / "cut", resume=True, capacity=again.capacity
    )
    assert second.status == "finished", second.message
    assert second.resumed_from == 4
    assert second.losses == outcome.losses
    assert second.metrics == outcome.metrics
    assert same_weights(again.model, whole.model)
    # What the Trainer has evaluated is what is left after finish.
    if whole.finish is not None:
        whole.finish(whole.model)
    assert evaluate(whole.model, data, 4).loss == outcome.metrics["eval_loss"]
