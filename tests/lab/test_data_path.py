"""How training gets its batches: grouped by length, prepared by workers, without waiting."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradrank.core.errors import OptionError
from gradrank.lab.grouping import GroupedSampler, grouped_order
from gradrank.lab.stopping import Stopper
from gradrank.lab.train import TrainSettings, train

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=400)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(lengths=LENGTHS, size=st.integers(1, 9), epoch=st.integers(0, 3))
def test_every_example_comes_once(lengths, size, epoch) -> None:
    order = grouped_order(lengths, size, 0, epoch)
    assert sorted(order) == list(range(len(lengths)))
    if epoch == 0 and len(lengths) >= size and len(lengths) % size == 0:
        assert max(lengths) in [lengths[index] for index in order[:size]]


def waste(lengths: list[int], order: list[int], size: int) -> int:
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return sum(
        len(batch) * max(lengths[i] for i in batch) - sum(lengths[i] for i in batch)
        for batch in batches
    )


def test_little_is_padding_and_every_epoch_has_an_order_of_its_own() -> None:
    lengths = torch.randint(5, 200, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    order = grouped_order(lengths, 8, 0, 0)
    assert waste(lengths, order, 8) < waste(lengths, list(range(1000)), 8) / 10
    assert order == grouped_order(lengths, 8, 0, 0)
    others = [grouped_order(lengths, 8, 0, 1), grouped_order(lengths, 8, 1, 0)]
    assert all(order != other for other in others)
    # Not from long to short: neighbouring batches differ.
    means = [sum(lengths[i] for i in order[s : s + 8]) for s in range(0, 1000, 8)]
    assert means != sorted(means, reverse=True)


def test_what_fills_no_batch_is_drawn_at_random() -> None:
    lengths = list(range(1, 22))
    tails = {grouped_order(lengths, 4, 0, epoch)[-1] for epoch in range(12)}
    assert len(tails) > 4


def test_the_sampler_follows_the_epoch() -> None:
    sampler = GroupedSampler([3, 1, 2, 5, 4, 9], 2, 7)
    first = list(sampler)
    sampler.set_epoch(1)
    assert (first, list(sampler)) == tuple(
        grouped_order([3, 1, 2, 5, 4, 9], 2, 7, epoch) for epoch in (0, 1)
    )
    assert len(sampler) == 6


def watched(data: Any) -> list[list[tuple[int, ...]]]:
    """Note the examples of every batch that is made."""
    seen: list[list[tuple[int, ...]]] = []
    collate = data.collate

    def spy(items: list[dict[str, Any]]) -> Any:
        seen.append([tuple(item["input_ids"]) for item in items])
        return collate(items)

    object.__setattr__(data, "collate", spy)
    return seen


def test_grouping_trains_on_the_same_examples_with_less_padding(prepare, tmp_path) -> None:
    outcomes, examples = [], []
    for grouped in (False, True):
        model, data = prepare("tiny-bert", "tiny-sentiment")
        seen = watched(data)
        steps = len(data.train) // 24
        chosen = TrainSettings(steps=steps, batch_size=24, group_by_length=grouped)
        outcomes.append(train(model, data, chosen, tmp_path / str(grouped)))
        whole = [row for batch in seen[:steps] for row in batch]
        examples.append(sorted(whole))
        real = sum(len(row) for row in whole)
        padded = sum(len(batch) * max(map(len, batch)) for batch in seen[:steps])
        assert (outcomes[-1].tokens, outcomes[-1].positions) == (real, padded)
    assert len(data.train) % 24 == 0, "both saw every example once"
    assert examples[0] == examples[1]
    assert outcomes[1].positions < outcomes[0].positions
    assert outcomes[1].tokens == outcomes[0].tokens


def adapter(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def test_a_grouped_run_resumes_to_the_same_bits(prepare, tmp_path) -> None:
    def run(out: Path, stop_at: int | None, resume: bool = False) -> tuple[Any, list[Any]]:
        model, data = prepare("tiny-bert", "tiny-sentiment")
        steps = len(data.train) // 64 + 2  # into the second epoch
        cut = stop_at is not None

        def progress(step: int, *_: Any) -> None:
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        chosen = TrainSettings(steps=steps, batch_size=64, lr=1e-2, group_by_length=True)
        told = progress if cut else None
        return train(model, data, chosen, out, on_progress=told, resume=resume), adapter(model)

    whole, wanted = run(tmp_path / "whole", None)
    for stop in (2, whole.steps - 1):
        cut, _ = run(tmp_path / str(stop), stop)
        assert cut.status == "interrupted"
        again, found = run(tmp_path / str(stop), None, resume=True)
        assert again.losses == whole.losses
        assert (again.tokens, again.positions) == (whole.tokens, whole.positions)
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_workers_give_the_same_losses(prepare, tmp_path) -> None:
    losses = []
    for workers in (0, 1):
        model, data = prepare("tiny-bert", "tiny-sentiment", lora_dropout=0.2)
        steps = len(data.train) // 64 + 2  # into the second epoch
        chosen = TrainSettings(steps=steps, batch_size=64, lr=1e-2, workers=workers)
        losses.append(train(model, data, chosen, tmp_path / str(workers)).losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("model", "task", "why"),
    [("tiny-llama", "tiny-lm", "full blocks"), ("tiny-vit", "tiny-images", "pictures of one size")],
)
def test_what_has_no_padding_is_not_grouped(prepare, tmp_path, model, task, why) -> None:
    adapted, data = prepare(model, task)
    outcome = train(adapted, data, TrainSettings(steps=1, group_by_length=True), tmp_path)
    assert outcome.status == "failed"
    assert why in outcome.message


def test_negative_workers_are_refused() -> None:
    with pytest.raises(OptionError, match="workers is -1"):
        TrainSettings(workers=-1).check()


def test_older_checkpoints_do_not_know_of_grouping() -> None:
    assert "group_by_length" not in TrainSettings().binding()
    assert TrainSettings(group_by_length=True).binding()["group_by_length"] is True
    assert "workers" not in TrainSettings(workers=2).binding()


class Waits(TorchDispatchMode):
    """Counts the times that the host asks for a number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        read = torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> Any:
            self.count += 1
            return read(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


class Marks(TrainerCallback):
    """The count at the end of every step."""

    def __init__(self, waits: Waits) -> None:
        self.waits, self.counts = waits, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts.append(self.waits.count)


def test_a_step_waits_for_the_device_no_oftener_than_the_trainer_alone(
    prepare, tmp_path, monkeypatch
) -> None:
    model, data = prepare("tiny-bert", "tiny-sentiment")
    counts: list[int] = []
    with monkeypatch.context() as patch, Waits(patch) as waits:
        chosen = TrainSettings(steps=4, batch_size=4, accumulation=2)
        note = lambda *_: counts.append(waits.count)  # noqa: E731
        train(model, data, chosen, tmp_path / "ours", on_progress=note)
    model, data = prepare("tiny-bert", "tiny-sentiment")
    with monkeypatch.context() as patch, Waits(patch) as waits:
        marks = Marks(waits)
        arguments = TrainingArguments(
            str(tmp_path / "alone"),
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
        )
        Trainer(
            model,
            arguments,
            train_dataset=data.train,
            data_collator=data.collate,
            callbacks=[marks],
        ).train()
    ours, alone = counts[3] - counts[2], marks.counts[3] - marks.counts[2]
    assert 0 < ours <= alone


def loiter(stopper: Stopper, ready: Any) -> None:
    ready.set()
    time.sleep(60)


def test_ctrl_c_is_for_training_and_not_for_its_workers() -> None:
    """Workers inherit the handlers; they live until they are told to end."""
    context = multiprocessing.get_context("fork")
    ready, said = context.Event(), []
    with Stopper(said.append) as stopper:
        worker = context.Process(target=loiter, args=(stopper, ready), daemon=True)
        worker.start()
        assert ready.wait(20)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGINT)
        worker.join(0.2)
        assert worker.is_alive()
        worker.terminate()
        worker.join(20)
    assert worker.exitcode == -signal.SIGTERM
    assert not stopper.asked
    assert said == []
