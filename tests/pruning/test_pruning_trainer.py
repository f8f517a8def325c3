"""The methods that prune under transformers' Trainer and TRL's: whole runs, best model, resume."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import gradrank as gr
from cases import VOCABULARY
from dynamic_cases import adamw, adapted, adapter_weights, same_tensors
from gradrank.adapters import sidecar
from pruning.pruning_runs import (
    BUDGET,
    DUE,
    METHODS,
    RANK,
    STEPS,
    everything,
    hooked,
    leftovers,
    logits,
    moments,
    pruning,
    stock,
    timeless,
)


def rows(count: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCABULARY, (7,), generator=generator) for _ in range(count)]
    return [
        {"input_ids": i, "labels": i.clone(), "attention_mask": torch.ones_like(i)} for i in ids
    ]


SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 2e-2,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "seed": 1,
}
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def trainer(
    folder: Path,
    method: Any,
    model: Any = None,
    extra: list[TrainerCallback] | None = None,
    optimizer: Any = None,
    **options: Any,
) -> Any:
    callback = gr.CapacityCallback(method, BUDGET)
    made: Any = Trainer(
        model=adapted(rank=RANK) if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **SETTINGS | options),
        train_dataset=rows(),  # pyright: ignore[reportArgumentType]
        eval_dataset=rows(4, seed=9),  # pyright: ignore[reportArgumentType]
        callbacks=[callback, *(extra or [])],
        optimizers=(optimizer, None),
    )
    made.capacity = callback
    return gr.prepare_trainer(made)


class Look(TrainerCallback):
    """Notes sizes and logits at the end of every step."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.logits: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"].optimizer
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for p in optimizer.state} == held
        self.sizes.append((everything(model), moments(optimizer) - len(held)))
        self.logits.append(logits(model))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def check_stock(made: Any, folder: Path) -> None:
    """The model is plain, and what is saved of it is what PEFT loads."""
    assert leftovers(made.model) == []
    made.save_model(str(folder))
    assert torch.equal(logits(stock(folder)), logits(made.model))
    ranks = sidecar.stored_ranks(folder)
    assert ranks == {name: rank for name, rank in made.capacity.run.ranks.items() if rank}


# --- whole runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_run_prunes_for_real_and_leaves_stock_peft(name: str, tmp_path: Path) -> None:
    look = Look()
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    options |= {"eval_strategy": "steps", "eval_steps": 1}
    model = adapted(rank=RANK, lora_dropout=0.1)
    made = trainer(tmp_path, pruning(name), model, [look], **options)
    wide = everything(model)
    made.train()
    run = made.capacity.run
    assert wide == run.start_parameters + 2 * RANK * len(run.ranks)
    assert [entry["step"] for entry in run.decisions] == DUE
    assert all(entry["parameters"] <= entry["budget"] for entry in run.decisions)
    assert run.decisions[-1]["budget"] == run.budget == run.start_parameters // 2
    assert made.capacity.start_parameters == run.start_parameters
    assert everything(made.model) == run.decisions[-1]["parameters"] <= run.budget
    sizes = [size for size, _ in look.sizes]
    assert sizes[0] > sizes[DUE[0] - 1] > sizes[DUE[1] - 1] >= sizes[-1]
    assert all(kept == 2 * size for size, kept in look.sizes)
    if name == "as-code":
        assert not min(run.ranks.values()), "the test shows nothing of dropped targets"
    check_stock(made, tmp_path / "final")


def test_the_trainer_decides_as_a_plain_loop(tmp_path: Path) -> None:
    method = pruning("igu", estimator="grid")
    options = {"weight_decay": 0.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    made = trainer(tmp_path, method, **options)
    seen: list[dict[str, Tensor]] = []
    compute = made.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append({key: value.clone() for key, value in inputs.items()})
        return compute(model, inputs, *args, **kwargs)

    made.compute_loss = compute_loss
    made.train()
    model = adapted(rank=RANK)
    gr.reserve(model, method, BUDGET)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0
    )
    with gr.Controller(model, optimizer, method, BUDGET, STEPS) as controller:
        for batch in seen:
            model(**batch).loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
    assert controller.ranks == made.capacity.run.ranks


@pytest.mark.parametrize("name", ["igu", "as-code"])
def test_evaluating_every_step_changes_nothing(name: str, tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", pruning(name))
    plain.train()
    evaluated = trainer(tmp_path / "b", pruning(name), eval_strategy="steps", eval_steps=1)
    evaluated.train()
    assert same_tensors(adapter_weights(plain.model), adapter_weights(evaluated.model))


@pytest.mark.parametrize("name", ["igu-direction", "adalora"])
def test_training_again_begins_again(name: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, pruning(name, r_min=1))
    made.train()
    first = made.capacity.run
    before = everything(made.model)
    made.train()
    second = made.capacity.run
    assert second is not first
    assert second.start_parameters == first.start_parameters > before
    assert [entry["step"] for entry in second.decisions] == DUE
    assert second.parameters <= second.budget
    check_stock(made, tmp_path / "final")


# --- the best model ----------------------------------------------------------------------------


def best_of(step: int, folder: Path, method: Any, extra: Any = ()) -> Any:
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, **SAVING}
    look = Look()
    made = trainer(folder, method, None, [look, *extra], metric_for_best_model="pick", **options)
    made.compute_metrics = lambda _: {"pick": float(made.state.global_step == step)}
    made.look = look
    return made


@pytest.mark.filterwarnings("ignore:the adapter has .* more than the budget:UserWarning")
@pytest.mark.parametrize(
    ("name", "step"), [("igu", 4), ("as-code", 2), ("igu-direction", 9), ("adalora", 6)]
)
def test_the_best_model_is_loaded_with_its_own_ranks(name: str, step: int, tmp_path: Path) -> None:
    """Also targets that have lost their adapter since come back with it."""
    made = best_of(step, tmp_path, pruning(name))
    made.train()
    best = tmp_path / f"checkpoint-{step}"
    assert Path(made.state.best_model_checkpoint) == best
    assert torch.equal(logits(made.model), made.look.logits[step - 1])
    ranks = sidecar.stored_ranks(best)
    assert {n: rank for n, rank in made.capacity.run.ranks.items() if rank} == ranks
    last = sidecar.stored_ranks(tmp_path / f"checkpoint-{STEPS}")
    assert (ranks == last) == (step > DUE[-1])
    if name == "as-code":
        assert set(last) < set(ranks), "the test shows nothing of adapters that come back"
    check_stock(made, tmp_path / "final")


def test_a_best_model_above_the_budget_is_warned_about(tmp_path: Path) -> None:
    made = best_of(4, tmp_path, pruning("adalora"))
    with pytest.warns(UserWarning, match=r"more than the budget of 1,856: .* after step 7"):
        made.train()
    assert leftovers(made.model) == []


@pytest.mark.filterwarnings("ignore:the adapter has .* more than the budget:UserWarning")
def test_stopping_early_and_loading_the_best_leaves_stock_peft(tmp_path: Path) -> None:
    """The step that would have come next is looked at already, at the training gradient."""
    made = best_of(2, tmp_path, pruning("igu-direction"), [StopAt(4)])
    made.train()
    assert torch.equal(logits(made.model), made.look.logits[1])
    check_stock(made, tmp_path / "final")


def test_stopping_before_the_first_pruning_warns(tmp_path: Path) -> None:
    made = trainer(tmp_path, pruning("igu"), None, [StopAt(1)])
    with pytest.warns(UserWarning, match=r"ended after step 1, and the first .* after step 3"):
        made.train()
    assert leftovers(made.model) == []


# --- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["igu", "as-code"])  # of the others: tests/resume
def test_resuming_equals_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    def fresh(folder: Path, **options: Any) -> Any:
        model = adapted(rank=RANK, lora_dropout=0.1)
        options |= {"gradient_accumulation_steps": 2}
        return trainer(folder, pruning(name), model, **options)

    whole = fresh(tmp_path, **SAVING)
    whole.train()
    story, weights = timeless(whole.capacity), adapter_weights(whole.model)
    for step in (DUE[1], 8):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        again = fresh(folder)
        again.train(resume_from_checkpoint=True)
        assert timeless(again.capacity) == story, step
        assert again.capacity.ranks_over_time == whole.capacity.ranks_over_time
        assert same_tensors(adapter_weights(again.model), weights), step
        check_stock(again, folder / "final")
    finished = fresh(tmp_path)
    finished.train(resume_from_checkpoint=True)
    assert timeless(finished.capacity) == story


def test_a_resumed_run_loads_a_best_model_from_before(tmp_path: Path) -> None:
    """The adapter is built anew without what the checkpoint has lost, and gets it back."""
    method = pruning("as-code")
    look = best_of(2, tmp_path, method)
    with pytest.warns(UserWarning, match="more than the budget"):
        look.train()
    for step in (9, STEPS):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    again = best_of(2, tmp_path, method)
    with pytest.warns(UserWarning, match="more than the budget"):
        again.train(resume_from_checkpoint=True)
    assert Path(again.state.best_model_checkpoint).name == "checkpoint-2"
    assert torch.equal(logits(again.model), look.look.logits[1])


def test_a_checkpoint_of_another_method_is_refused_by_name(tmp_path: Path) -> None:
    trainer(tmp_path, pruning("igu"), **SAVING).train()
    for step in range(6, STEPS + 1):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    other = trainer(tmp_path, pruning("adalora"))
    with pytest.raises(gr.OptionError, match="made with other settings: method 'igu' -> 'adalora'"):
        other.train(resume_from_checkpoint=True)


# --- what goes wrong is told -------------------------------------------------------------------


def test_an_optimizer_made_before_the_trainer_is_refused(tmp_path: Path) -> None:
    model = adapted(rank=RANK)
    optimizer = adamw(model)
    made = trainer(tmp_path, pruning("igu"), model, optimizer=optimizer)
    with pytest.raises(gr.SurgeryError, match="not in the optimizer; build the optimizer after"):
        made.train()
    assert hooked(optimizer) == 0


def test_an_optimizer_made_after_reserve_is_taken(tmp_path: Path) -> None:
    model = adapted(rank=RANK)
    method = pruning("igu")
    gr.reserve(model, method, BUDGET)
    made = trainer(tmp_path, method, model, optimizer=adamw(model))
    made.train()
    check_stock(made, tmp_path / "final")


def test_too_few_steps_are_refused_before_the_first(tmp_path: Path) -> None:
    made = trainer(tmp_path, pruning("igu"), max_steps=4)
    with pytest.raises(gr.OptionError, match="would never take any capacity away: of 4 steps"):
        made.train()


@pytest.mark.parametrize("given", [False, True])
def test_a_loss_of_the_trainers_own_needs_a_loss_function(given: bool, tmp_path: Path) -> None:
    def own(model: Any, batch: Any) -> Tensor:
        found = model(input_ids=batch["input_ids"]).logits[:, :-1]
        wanted = batch["input_ids"][:, 1:]
        return torch.nn.functional.cross_entropy(found.flatten(0, 1), wanted.flatten())

    made = trainer(tmp_path, pruning("igu"))
    made.train_dataset = [{k: v for k, v in row.items() if k != "labels"} for row in rows()]
    made.compute_loss = lambda model, inputs, *_, **__: own(model, inputs)
    made.capacity.loss_function = own if given else None
    if given:
        made.train()
        check_stock(made, tmp_path / "final")
    else:
        with pytest.raises(gr.MeasurementError, match=r"gave no loss .* loss_function\(model"):
            made.train()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL 1.16 uses names that v5 renamed
def test_trls_trainer_prunes_and_resumes(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    keys = ("max_steps", "per_device_train_batch_size", "learning_rate", "report_to", "use_cpu")
    keys += ("disable_tqdm", "dataloader_pin_memory")
    options = {key: SETTINGS[key] for key in keys} | {"bf16": False, **SAVING, "save_steps": 4}

    def make() -> Any:
        made = trl.SFTTrainer(
            model=adapted(rank=RANK),
            args=trl.SFTConfig(output_dir=str(tmp_path), **options),
            train_dataset=datasets.Dataset.from_list(
                [{"input_ids": row["input_ids"].tolist()} for row in rows()]
            ),
            processing_class=tokenizer(),
            callbacks=[gr.CapacityCallback(pruning("igu"), BUDGET)],
        )
        return gr.prepare_trainer(made)

    made = make()
    made.train()
    # Its gradient checkpointing hooks the embedding.
    assert [name for name in leftovers(made.model) if "embed_tokens" not in name] == []
    ranks = sidecar.stored_ranks(tmp_path / f"checkpoint-{STEPS}")
    assert len(set(ranks.values())) > 1
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    shutil.rmtree(tmp_path / "checkpoint-8")
    again = make()
    again.train(resume_from_checkpoint=True)
    assert sidecar.stored_ranks(tmp_path / f"checkpoint-{STEPS}") == ranks
    assert same_tensors(adapter_weights(again.model), adapter_weights(made.model))


def tokenizer() -> Any:
    """Words ``w3`` and so on, as many as the tiny models know."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
