"""Lengths in epochs as steps, and the schedules of the learning rate."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from gradrank.lab.epochs import options_in_steps, steps_in
from gradrank.lab.settings import SCHEDULES, TrainSettings, trainer_arguments


@settings(deadline=None, derandomize=True, max_examples=60)
@given(epochs=st.integers(1, 80), examples=st.integers(1, 200_000), size=st.integers(1, 256))
def test_steps_cover_the_epochs_and_not_one_step_more(epochs, examples, size) -> None:
    steps = steps_in(epochs, examples, size)
    assert steps * size >= epochs * examples
    assert steps == 1 or (steps - 1) * size < epochs * examples


def test_a_part_of_an_epoch_is_no_step_too_many() -> None:
    assert steps_in(0.1, 30, 1) == 3  # 0.1 * 30 is 3.0000000000000004
    assert steps_in(1e-6, 10, 8) == 1


@pytest.mark.parametrize(
    ("text", "steps"),
    [("1 epoch", "4"), ("2epochs", "8"), ("0.5 epochs", "2"), (" 1.5  epochs ", "6")],
)
def test_options_in_epochs_become_steps(text, steps) -> None:
    found = options_in_steps({"initial_steps": text, "rule": "mean"}, 32, 8)
    assert found == {"initial_steps": steps, "rule": "mean"}


@pytest.mark.parametrize("value", [20, "20", "epoch", "one epoch", "-1 epochs", None, "1 epochal"])
def test_other_options_stay_as_they_are(value) -> None:
    assert options_in_steps({"a": value}, 32, 8) == {"a": value}


def test_cosine_falls_to_zero_along_half_a_cosine(tmp_path: Path) -> None:
    asked = TrainSettings(steps=20, warmup=4, lr=1.0, schedule="cosine")
    asked.check()
    arguments = trainer_arguments(asked, tmp_path, torch.device("cpu"), 100)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=asked.lr)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type, optimizer, int(arguments.warmup_steps), 20
    )
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rising = [step / 4 for step in range(4)]
    falling = [(1 + math.cos(math.pi * (step - 4) / 16)) / 2 for step in range(4, 20)]
    assert rates == pytest.approx(rising + falling)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
    assert set(SCHEDULES) == {"linear", "cosine", "constant"}
