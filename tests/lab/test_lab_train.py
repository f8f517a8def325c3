"""Training: repeatable, resumable to the bit, and clear about every way it can end."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from gradrank.core.errors import DataError, OptionError
from gradrank.core.marker import MARKER, is_complete
from gradrank.lab.checkpoints import STATE, last_complete
from gradrank.lab.evaluate import evaluate
from gradrank.lab.settings import PRECISIONS, autocast_dtype, trainer_arguments
from gradrank.lab.train import TrainSettings, count_trainable, train

SETTINGS = TrainSettings(steps=6, batch_size=4, lr=1e-2)


def adapter(model) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("model_name", "task"),
    [
        ("tiny-llama", "tiny-lm"),
        ("tiny-gpt2", "tiny-lm"),
        ("tiny-bert", "tiny-sentiment"),
        ("tiny-llama", "tiny-sentiment"),
        ("tiny-vit", "tiny-images"),
    ],
)
def test_every_head_learns(prepare, tmp_path, model_name, task):
    model, data = prepare(model_name, task)
    before = evaluate(model, data, 16).loss
    outcome = train(model, data, TrainSettings(steps=80, batch_size=16, lr=1e-2), tmp_path)
    assert outcome.status == "finished"
    assert outcome.message == ""
    assert [step for step, _ in outcome.losses] == list(range(1, 81))
    assert outcome.metrics["eval_loss"] < before - 0.05
    assert outcome.eval_losses == [[80, outcome.metrics["eval_loss"]]]
    assert outcome.metrics["eval_loss"] == evaluate(model, data, 16).loss
    assert outcome.peak_memory_bytes > 0
    assert outcome.train_seconds > 0
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_same_seed_same_losses_to_the_bit(prepare, tmp_path):
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        model, data = prepare("tiny-gpt2", "tiny-lm", lora_dropout=0.2)  # dropout takes part
        torch.manual_seed(number)  # what was drawn before must not matter
        settings = TrainSettings(steps=4, batch_size=4, lr=1e-2, seed=seed)
        outcome = train(model, data, settings, tmp_path / str(number))
        runs.append((outcome.losses, adapter(model)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_first_loss_is_the_loss_of_the_untouched_model(prepare, tmp_path):
    model, data = prepare("tiny-llama", "tiny-lm")
    size = len(data.train)
    object.__setattr__(data, "eval", data.train)
    expected = evaluate(model, data, size).loss
    outcome = train(model, data, TrainSettings(steps=1, batch_size=size, lr=1e-2), tmp_path)
    assert outcome.losses[0][1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("model_name", "task"), [("tiny-llama", "tiny-lm"), ("tiny-bert", "tiny-sentiment")]
)
def test_accumulation_equals_one_large_batch(prepare, tmp_path, model_name, task):
    losses, weights = [], []
    for size, micro in ((8, 1), (2, 4)):
        model, data = prepare(model_name, task)
        model.config.attention_probs_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        settings = TrainSettings(steps=3, batch_size=size, accumulation=micro, lr=1e-2)
        outcome = train(model, data, settings, tmp_path / str(size))
        losses.append([loss for _, loss in outcome.losses])
        weights.append((outcome.tokens, adapter(model)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    if task == "tiny-lm":
        assert weights[0][0] == weights[1][0] == 3 * 8 * 16


def test_evaluating_often_does_not_change_training(prepare, tmp_path):
    losses = []
    for every in (0, 1):
        model, data = prepare("tiny-gpt2", "tiny-lm")
        settings = TrainSettings(steps=4, batch_size=4, lr=1e-2, eval_every=every)
        outcome = train(model, data, settings, tmp_path / str(every))
        losses.append(outcome.losses)
    assert losses[0] == losses[1]
    assert [step for step, _ in outcome.eval_losses] == [1, 2, 3, 4]


def test_gradient_checkpointing_gives_the_same_losses(prepare, tmp_path):
    losses = []
    for on in (False, True):
        model, data = prepare()
        settings = TrainSettings(steps=3, batch_size=4, lr=1e-2, gradient_checkpointing=on)
        losses.append([loss for _, loss in train(model, data, settings, tmp_path).losses])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bfloat16_trains_near_float32(prepare, tmp_path):
    losses = []
    for precision in ("float32", "bfloat16"):
        model, data = prepare()
        settings = TrainSettings(steps=3, batch_size=4, lr=1e-2, precision=precision)
        losses.append([loss for _, loss in train(model, data, settings, tmp_path).losses])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_progress_tells_every_step(prepare, tmp_path):
    model, data = prepare()
    told = []
    outcome = train(model, data, SETTINGS, tmp_path, lambda *args: told.append(args))
    assert [(step, total) for step, total, _, _ in told] == [(i, 6) for i in range(1, 7)]
    assert [[step, loss] for step, _, loss, _ in told] == outcome.losses
    assert told[-1][3] == 0
    assert all(left > 0 for _, _, _, left in told[:-1])


def test_trainable_parameters_are_told_apart(prepare):
    model, _ = prepare("tiny-vit", "tiny-images")
    adapters, other = count_trainable(model)
    assert other == 32 * 3 + 3  # the new classifier
    named = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert adapters + other == sum(named.values())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(OptionError, match="no trainable parameter"):
        count_trainable(model)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_run_resumes_to_the_same_bits(prepare, tmp_path, name):
    settings = TrainSettings(steps=6, batch_size=4, lr=1e-2, eval_every=2)
    whole_model, data = prepare("tiny-gpt2", "tiny-lm", lora_dropout=0.2)
    whole = train(whole_model, data, settings, tmp_path / "whole")

    model, data = prepare("tiny-gpt2", "tiny-lm", lora_dropout=0.2)
    said: list[str] = []

    def progress(done: int, *_more) -> None:
        if done == 3:
            os.kill(os.getpid(), getattr(signal, name))

    first = train(model, data, settings, tmp_path / "cut", progress, say=said.append)
    assert first.status == "interrupted"
    assert first.steps == 3
    assert "--resume" in first.message
    assert "step 3" in first.message
    assert first.metrics == {}
    assert "press Ctrl-C again" in said[0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    model, data = prepare("tiny-gpt2", "tiny-lm", lora_dropout=0.2)
    second = train(model, data, settings, tmp_path / "cut", resume=True, say=said.append)
    assert second.status == "finished"
    assert second.resumed_from == 3
    assert "resuming at step 3 of 6" in said[-1]
    assert second.losses == whole.losses
    assert second.eval_losses == whole.eval_losses
    assert second.tokens == whole.tokens
    assert same(adapter(model), adapter(whole_model))
    assert second.metrics == whole.metrics


def test_second_signal_stops_at_once(prepare, tmp_path):
    model, data = prepare()

    def progress(done: int, *_more) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    outcome = train(model, data, SETTINGS, tmp_path, progress)
    assert outcome.status == "interrupted"
    assert "no checkpoint was written" in outcome.message
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_outside_the_main_thread_works(prepare, tmp_path):
    model, data = prepare()
    found = []
    worker = threading.Thread(target=lambda: found.append(train(model, data, SETTINGS, tmp_path)))
    worker.start()
    worker.join(120)
    assert found[0].status == "finished"


def cut_run(prepare, out: Path, steps: int = 6):
    model, data = prepare()
    settings = TrainSettings(steps=steps, batch_size=4, lr=1e-2, save_every=2, keep_checkpoints=3)
    train(model, data, settings, out)
    return settings


def test_checkpoints_hold_no_pickled_arguments_and_are_limited(prepare, tmp_path):
    model, data = prepare()
    settings = TrainSettings(steps=8, batch_size=4, lr=1e-2, save_every=2)
    train(model, data, settings, tmp_path)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["checkpoint-6", "checkpoint-8"]
    for path in (tmp_path / "checkpoints").iterdir():
        assert is_complete(path)
        assert not (path / "training_args.bin").exists()
        assert str(tmp_path) not in (path / STATE).read_text()


def truncate(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: truncate(folder, "adapter_model.safetensors"),
        lambda folder: truncate(folder, "optimizer.pt"),
        lambda folder: truncate(folder, MARKER),
        lambda folder: (folder / MARKER).unlink(),
        lambda folder: (folder / "rng_state.pth").unlink(),
        lambda folder: (folder / MARKER).write_text(json.dumps({"files": {}})),
    ],
)
def test_checkpoint_cut_off_in_writing_is_skipped(prepare, tmp_path, damage):
    settings = cut_run(prepare, tmp_path)
    folder = tmp_path / "checkpoints"
    assert last_complete(folder) == folder / "checkpoint-6"
    damage(folder / "checkpoint-6")
    assert last_complete(folder) == folder / "checkpoint-4"
    model, data = prepare()
    outcome = train(model, data, settings, tmp_path, resume=True)
    assert outcome.resumed_from == 4
    assert outcome.status == "finished"
    assert [step for step, _ in outcome.losses] == [1, 2, 3, 4, 5, 6]


def test_resume_without_a_checkpoint_starts_anew(prepare, tmp_path):
    model, data = prepare()
    said: list[str] = []
    outcome = train(model, data, SETTINGS, tmp_path, resume=True, say=said.append)
    assert outcome.resumed_from is None
    assert "starting at step 0" in said[0]
    assert len(outcome.losses) == 6


def test_resuming_a_finished_run_only_evaluates(prepare, tmp_path):
    settings = cut_run(prepare, tmp_path)
    model, data = prepare()
    outcome = train(model, data, settings, tmp_path, resume=True)
    assert outcome.status == "finished"
    assert outcome.resumed_from == 6
    assert len(outcome.losses) == 6
    assert outcome.metrics


def test_resuming_with_other_settings_is_refused(prepare, tmp_path):
    cut_run(prepare, tmp_path)
    model, data = prepare()
    other = TrainSettings(steps=6, batch_size=4, lr=3e-2, seed=5, save_every=1)
    with pytest.raises(OptionError, match=r"lr 0.01 -> 0.03, seed 0 -> 5"):
        train(model, data, other, tmp_path, resume=True)


def test_resuming_with_another_plan_is_refused(prepare, tmp_path):
    settings = cut_run(prepare, tmp_path)
    model, data = prepare(r=4)
    with pytest.raises(DataError, match=r"another plan.*'r'"):
        train(model, data, settings, tmp_path, resume=True)


def test_divergence_names_the_step(prepare, tmp_path):
    model, data = prepare()

    def poison(done: int, *_more) -> None:
        if done == 2:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    outcome = train(model, data, SETTINGS, tmp_path, poison)
    assert outcome.status == "failed"
    assert "loss is nan at step 3 of 6" in outcome.message
    assert "learning rate (now 0.01)" in outcome.message
    assert [step for step, _ in outcome.losses] == [1, 2]
    assert outcome.metrics == {}


def raising(error: BaseException):
    def progress(done: int, *_more) -> None:
        if done == 2:
            raise error

    return progress


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_lack_of_memory_says_what_to_lower(prepare, tmp_path, error):
    model, data = prepare()
    outcome = train(model, data, SETTINGS, tmp_path, raising(error))
    assert outcome.status == "failed"
    assert "out of memory on cpu at step 3. Lower batch_size (now 4)" in outcome.message
    assert len(outcome.losses) == 2


def test_data_that_breaks_in_the_middle_is_named(prepare, tmp_path):
    model, data = prepare()
    outcome = train(model, data, SETTINGS, tmp_path, raising(DataError("picture 'x' is gone.")))
    assert (outcome.status, outcome.message) == ("failed", "picture 'x' is gone.")


def test_a_mistake_of_ours_is_not_hidden(prepare, tmp_path):
    model, data = prepare()
    with pytest.raises(RuntimeError, match="shapes"):
        train(model, data, SETTINGS, tmp_path, raising(RuntimeError("shapes")))


def test_disk_that_fills_up_is_explained(prepare, tmp_path, monkeypatch):
    model, data = prepare()

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    settings = TrainSettings(steps=4, batch_size=4, lr=1e-2, save_every=2)
    outcome = train(model, data, settings, tmp_path)
    assert outcome.status == "failed"
    assert "no space left" in outcome.message
    assert "checkpoint of step 2" in outcome.message
    assert last_complete(tmp_path / "checkpoints") is None


def test_model_configuration_is_left_alone(prepare, tmp_path):
    model, data = prepare()
    model.config.use_cache = True
    train(model, data, SETTINGS, tmp_path)
    assert model.config.use_cache is True


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 0}, "steps is 0, at least 1"),
        ({"batch_size": 0, "accumulation": 0}, r"batch_size is 0.*accumulation is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"schedule": "liner"}, "Did you mean 'linear'"),
        ({"precision": "float23"}, "Did you mean 'float32'"),
        ({"keep_checkpoints": 1}, "keep_checkpoints is 1, at least 2"),
        ({"max_eval_batches": 0}, "max_eval_batches is 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
)
def test_settings_are_checked(prepare, tmp_path, settings, told):
    model, data = prepare()
    with pytest.raises(OptionError, match=told):
        train(model, data, TrainSettings(**settings), tmp_path)


def test_autocast_is_chosen_by_device():
    cpu = torch.device("cpu")
    assert [autocast_dtype(name, cpu) for name in PRECISIONS] == [None, None, torch.bfloat16]


def test_trainer_reports_nowhere_and_drops_only_surplus(tmp_path):
    cpu = torch.device("cpu")
    arguments = trainer_arguments(TrainSettings(batch_size=8), tmp_path, cpu, 100)
    assert arguments.report_to == []
    assert arguments.dataloader_drop_last
    assert not trainer_arguments(TrainSettings(batch_size=8), tmp_path, cpu, 5).dataloader_drop_last


def test_data_smaller_than_a_batch_trains(prepare, tmp_path):
    model, data = prepare()
    settings = TrainSettings(steps=2, batch_size=len(data.train) + 5, lr=1e-2)
    outcome = train(model, data, settings, tmp_path)
    assert outcome.status == "finished"
    assert outcome.tokens == 2 * data.train.ids.numel()
