"""`pilora` under transformers' Trainer and TRL's: both stages, the best model, resuming."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import gradrank as gr
from dynamic_cases import adamw, adapted, adapter_weights, same_tensors
from gradrank.adapters import sidecar
from gradrank.adapters.view import lora_sites
from neurons.neuron_runs import BUDGET, INITIAL, RANK, STEPS, pilora, splits
from pruning.pruning_runs import hooked, leftovers, logits, stock, timeless
from pruning.test_pruning_trainer import SAVING, SETTINGS, StopAt, check_stock, rows, tokenizer

SPLIT = INITIAL


def trainer(
    folder: Path,
    method: Any,
    extra: Any = (),
    model: Any = None,
    optimizer: Any = None,
    **options: Any,
) -> Any:
    budget = options.pop("budget", BUDGET)
    callback = gr.CapacityCallback(method, budget)
    settings: dict[str, Any] = SETTINGS | {"max_steps": STEPS} | options
    made: Any = Trainer(
        model=adapted(rank=2, lora_dropout=0.1) if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=rows(),  # pyright: ignore[reportArgumentType]
        eval_dataset=rows(4, seed=9),  # pyright: ignore[reportArgumentType]
        callbacks=[callback, *extra],
        optimizers=(optimizer, None),
    )
    made.capacity = callback
    return gr.prepare_trainer(made)


class Notes(TrainerCallback):
    """Logits and shapes at the end of every step."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []
        self.split: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.logits.append(logits(model))
        sites = lora_sites(model, "default").values()
        self.split.append(any(site.partition is not None for site in sites))
        held = {id(p) for group in kwargs["optimizer"].param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_both_stages_run_and_leave_stock_peft(tmp_path: Path) -> None:
    notes = Notes()
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    made = trainer(tmp_path, pilora(), [notes], **options)
    made.train()
    run = made.capacity.run
    assert [entry["step"] for entry in run.decisions] == [SPLIT]
    assert notes.split == [step >= SPLIT for step in range(1, STEPS + 1)]
    assert run.start_parameters == made.capacity.start_parameters == run.budget
    assert run.decisions[0]["parameters"] < run.budget
    assert run.decisions[0]["looks"] == SPLIT // 2
    assert made.capacity.neurons == run.neurons
    check_stock(made, tmp_path / "final")


def test_the_trainer_splits_as_a_plain_loop(tmp_path: Path) -> None:
    """With accumulation and clipping, which a look does not see."""
    options: dict[str, Any] = {
        "weight_decay": 0.0,
        "max_grad_norm": 0.05,
        "lr_scheduler_type": "constant",
    }
    model = adapted(rank=RANK)
    made = trainer(tmp_path, pilora(), (), model, gradient_accumulation_steps=2, **options)
    seen: list[Any] = []
    compute = made.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({key: value.clone() for key, value in inputs.items()})
        return compute(model, inputs, *args, **kwargs)

    made.compute_loss = compute_loss
    made.train()
    model = adapted(rank=RANK)
    gr.reserve(model, pilora(), BUDGET)
    optimizer = adamw(model, 2e-2)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    controller = gr.Controller(model, optimizer, pilora(), BUDGET, STEPS)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        for batch in (first, second):
            (model(**batch).loss / 2).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, 0.05)
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert splits(controller) == splits(made.capacity)
    one, other = controller.run.course.state(), made.capacity.run.course.state()
    hits = [key for key in one if key.startswith("hits/")]
    assert hits
    assert all(torch.equal(one[key], other[key]) for key in hits)


def test_training_again_is_refused_where_the_ranks_have_grown(tmp_path: Path) -> None:
    """The settled adapter has r + r' components, more than a first stage is to have."""
    made = trainer(tmp_path, pilora())
    made.train()
    with pytest.raises(gr.SurgeryError, match="higher rank than the first stage"):
        made.train()
    assert leftovers(made.model) == []


# --- the best model ----------------------------------------------------------------------------


def best_of(step: int, folder: Path, method: Any, extra: Any = (), **more: Any) -> Any:
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        **SAVING,
    }
    notes = Notes()
    options |= {"metric_for_best_model": "pick", **more}
    made = trainer(folder, method, [notes, *extra], **options)
    made.compute_metrics = lambda _: {"pick": float(made.state.global_step == step)}
    made.notes = notes
    return made


def check_best(made: Any, step: int, folder: Path) -> None:
    best = folder / f"checkpoint-{step}"
    assert Path(made.state.best_model_checkpoint) == best
    assert torch.equal(logits(made.model), made.notes.logits[step - 1])
    ranks = sidecar.stored_ranks(best)
    assert {n: rank for n, rank in made.capacity.run.ranks.items() if rank} == ranks
    assert set(ranks.values()) == ({RANK} if step < SPLIT else {RANK + 1})
    check_stock(made, folder / "final")


@pytest.mark.parametrize(("step", "start"), [(2, "restart"), (SPLIT, "restart"), (6, "warm")])
def test_the_best_model_of_either_stage_is_loaded(step: int, start: str, tmp_path: Path) -> None:
    made = best_of(step, tmp_path, pilora(start=start))
    made.train()
    check_best(made, step, tmp_path)


def test_adapters_that_were_lost_at_the_split_come_back_with_the_best_model(
    tmp_path: Path,
) -> None:
    """At r' = 0 targets without a dominant row lose theirs."""
    method = pilora(supplementary_rank=0, rule="random", fraction=0.02)
    made = best_of(2, tmp_path, method)
    made.train()
    last = sidecar.stored_ranks(tmp_path / f"checkpoint-{STEPS}")
    best = sidecar.stored_ranks(tmp_path / "checkpoint-2")
    assert set(last) < set(best), "no target lost its adapter"
    assert torch.equal(logits(made.model), made.notes.logits[1])
    check_stock(made, tmp_path / "final")


def test_a_best_model_of_a_first_stage_above_the_budget_is_warned_about(tmp_path: Path) -> None:
    made = best_of(2, tmp_path, pilora(), budget=2_400)
    with pytest.warns(UserWarning, match=r"more than the budget of 2,400: .* before the split"):
        made.train()
    assert leftovers(made.model) == []


def test_a_resumed_run_loads_a_best_model_of_the_first_stage(tmp_path: Path) -> None:
    made = best_of(2, tmp_path, pilora())
    made.train()
    for step in (7, STEPS):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    again = best_of(2, tmp_path, pilora())
    again.train(resume_from_checkpoint=True)
    assert Path(again.state.best_model_checkpoint).name == "checkpoint-2"
    assert torch.equal(logits(again.model), made.notes.logits[1])
    check_stock(again, tmp_path / "final")


def test_stopping_in_the_first_stage_warns(tmp_path: Path) -> None:
    made = trainer(tmp_path, pilora(), [StopAt(2)])
    with pytest.warns(UserWarning, match=r"ended after step 2, and the first .* after step 4"):
        made.train()
    assert leftovers(made.model) == []


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, (2, SPLIT, 6)),
        ({"start": "warm"}, (SPLIT,)),
        ({"rule": "top_fraction", "fraction": 0.0}, (6,)),
        ({"rule": "top_fraction", "fraction": 1.0, "dominant_rank": 3}, (SPLIT,)),
        ({"rule": "random", "fraction": 0.02, "supplementary_rank": 0}, (6,)),
    ],
    ids=["restart", "warm", "none", "all", "lost"],
)
def test_resuming_in_either_stage_is_bitwise(
    options: dict[str, Any], steps: tuple[int, ...], tmp_path: Path
) -> None:
    more: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, **SAVING}
    whole = trainer(tmp_path, pilora(**options), **more)
    whole.train()
    story, weights = timeless(whole.capacity), adapter_weights(whole.model)
    for step in steps:
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        again = trainer(folder, pilora(**options), **more)
        again.train(resume_from_checkpoint=True)
        assert timeless(again.capacity) == story, step
        assert again.capacity.ranks_over_time == whole.capacity.ranks_over_time
        assert again.capacity.neurons == whole.capacity.neurons
        assert same_tensors(adapter_weights(again.model), weights), step
        check_stock(again, folder / "final")


def test_a_run_that_is_finished_still_knows_its_partitions(tmp_path: Path) -> None:
    whole = trainer(tmp_path, pilora(), **SAVING)
    whole.train()
    story = timeless(whole.capacity)
    finished = trainer(tmp_path, pilora(), **SAVING)
    finished.train(resume_from_checkpoint=True)
    assert timeless(finished.capacity) == story
    assert finished.capacity.neurons == whole.capacity.neurons


def test_checkpoints_of_both_stages_load_in_stock_peft(tmp_path: Path) -> None:
    notes = Notes()
    made = trainer(tmp_path, pilora(), [notes], **SAVING)
    made.train()
    for step in (2, SPLIT, 6):
        again = stock(tmp_path / f"checkpoint-{step}")
        assert torch.equal(logits(again), notes.logits[step - 1]), step


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, pilora(), **SAVING).train()
    other = trainer(tmp_path, pilora(start="warm"))
    with pytest.raises(gr.OptionError, match="made with other settings: options"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# --- what goes wrong is told -------------------------------------------------------------------


def test_an_optimizer_made_before_the_trainer_is_refused(tmp_path: Path) -> None:
    model = adapted(rank=2)
    optimizer = adamw(model)
    made = trainer(tmp_path, pilora(), (), model, optimizer)
    with pytest.raises(gr.SurgeryError, match="not in the optimizer; build the optimizer after"):
        made.train()
    assert hooked(optimizer) == 0


def test_too_few_steps_are_refused_before_the_first(tmp_path: Path) -> None:
    made = trainer(tmp_path, pilora(), max_steps=INITIAL)
    with pytest.raises(gr.OptionError, match="would never reach its second stage"):
        made.train()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL 1.16 uses names that v5 renamed
def test_trls_trainer_splits_and_resumes_in_either_stage(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    keys = ("per_device_train_batch_size", "learning_rate", "report_to", "use_cpu")
    keys += ("disable_tqdm", "dataloader_pin_memory")
    options = {key: SETTINGS[key] for key in keys} | {"bf16": False, "max_steps": STEPS}
    options |= SAVING | {"save_steps": 2}

    def make(folder: Path) -> Any:
        capacity = gr.CapacityCallback(pilora(), BUDGET)
        made = trl.SFTTrainer(
            model=adapted(rank=RANK),
            args=trl.SFTConfig(output_dir=str(folder), **options),
            train_dataset=datasets.Dataset.from_list(
                [{"input_ids": row["input_ids"].tolist()} for row in rows()]
            ),
            processing_class=tokenizer(),
            callbacks=[capacity],
        )
        made.capacity = capacity
        return gr.prepare_trainer(made)

    made = make(tmp_path)
    made.train()
    # Its gradient checkpointing hooks the embedding.
    assert [name for name in leftovers(made.model) if "embed_tokens" not in name] == []
    assert set(sidecar.stored_ranks(tmp_path / f"checkpoint-{STEPS}").values()) == {RANK + 1}
    for step in (2, 6):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        again = make(folder)
        again.train(resume_from_checkpoint=True)
        assert again.capacity.neurons == made.capacity.neurons
        assert same_tensors(adapter_weights(again.model), adapter_weights(made.model))
