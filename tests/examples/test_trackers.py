"""Decisions in the Trainer's own reporting: where trackers look, and nothing else disturbed."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

import gradrank as gr
from cases import CASES, batches
from dynamic_cases import RANK, adapted, method, parameters
from gradrank.lab.tiny import TINY_MODELS, byte_tokenizer

STEPS = 6
DUE = [2, 4]


class Tracker(TrainerCallback):
    """What a tracker is: it sees the logs of the main process and the step that they are of."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append((state.global_step, dict(kwargs["logs"])))


def train(
    folder: Path, tracker: Tracker, capacity: gr.CapacityCallback, prepare: bool = True
) -> Any:
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=3,
        learning_rate=5e-2,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    rows = [{key: value[0] for key, value in batch.items()} for batch in batches(CASES["llama"], 9)]
    made = Trainer(adapted(), arguments, train_dataset=rows, callbacks=[tracker, capacity])  # pyright: ignore[reportArgumentType]
    if prepare:
        gr.prepare_trainer(made)
    made.train()
    return made


def steps_of(tracker: Tracker, key: str) -> list[int]:
    return [step for step, logs in tracker.seen if key in logs]


def test_a_tracker_sees_every_decision_and_every_log_of_the_trainer(tmp_path: Path) -> None:
    tracker, capacity = Tracker(), gr.CapacityCallback(method(), f"uniform:{RANK}")
    made = train(tmp_path, tracker, capacity)
    assert steps_of(tracker, "gradrank/moved") == DUE
    # A decision falls on the very steps of the Trainer's own logs, and takes none of them away.
    assert steps_of(tracker, "loss") == [2, 4, 6]
    told = [logs for _, logs in tracker.seen if "gradrank/moved" in logs]
    for entry, decision in zip(told, capacity.decisions, strict=True):
        for key in ("parameters", "budget", "moved", "changed", "seconds"):
            assert entry[f"gradrank/{key}"] == decision[key]
    ranks = capacity.run.ranks.values() if capacity.run else []
    assert (told[-1]["gradrank/smallest_rank"], told[-1]["gradrank/largest_rank"]) == (
        min(ranks),
        max(ranks),
    )
    assert told[-1]["gradrank/parameters"] == parameters(made.model)
    # Numbers alone: trackers leave out, or choke on, anything else.
    assert {type(fact) for logs in told for fact in logs.values()} <= {int, float}
    kept = [entry["step"] for entry in made.state.log_history if "gradrank/moved" in entry]
    assert kept == DUE


def test_without_prepare_trainer_nothing_is_logged(tmp_path: Path) -> None:
    tracker, capacity = Tracker(), gr.CapacityCallback(method(), f"uniform:{RANK}")
    train(tmp_path, tracker, capacity, prepare=False)
    assert [decision["step"] for decision in capacity.decisions] == DUE
    assert steps_of(tracker, "gradrank/moved") == []
    assert steps_of(tracker, "loss") == [2, 4, 6]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL 1.16 uses names that v5 renamed
def test_trls_own_averages_stay_with_its_losses(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(TINY_MODELS["tiny-llama"]())
    options = {"use_cpu": True, "bf16": False, "max_steps": STEPS, "per_device_train_batch_size": 3}
    options |= {"learning_rate": 5e-2, "report_to": "none", "disable_tqdm": True}
    options |= {"save_strategy": "no", "logging_steps": 2, "dataloader_pin_memory": False}
    tracker, capacity = Tracker(), gr.CapacityCallback(method(), f"uniform:{RANK}")
    made = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **options),
        train_dataset=datasets.Dataset.from_list([{"text": f"text {i} of nine"} for i in range(9)]),
        processing_class=byte_tokenizer(),
        peft_config=gr.plan(model, [], "uniform", f"uniform:{RANK}").lora_config(),
        callbacks=[tracker, capacity],
    )
    gr.prepare_trainer(made).train()
    assert steps_of(tracker, "gradrank/moved") == DUE
    with_loss = [
        (step, "mean_token_accuracy" in logs) for step, logs in tracker.seen if "loss" in logs
    ]
    assert with_loss == [(2, True), (4, True), (6, True)]
