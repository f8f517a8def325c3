"""The callback under transformers' Trainer: ranks move, checkpoints load, resuming is exact."""

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import gradrank as gr
from cases import CASES, VOCABULARY
from dynamic_cases import (
    OPTIONS,
    RANK,
    STEPS,
    adapted,
    adapter_weights,
    hooks,
    method,
    parameters,
    same_tensors,
)
from gradrank.adapters import sidecar
from gradrank.core import marker
from gradrank.lab.settings import checkpointing_arguments

DUE = [2, 4, 6]


def rows(count: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCABULARY, (7,), generator=generator) for _ in range(count)]
    return [
        {"input_ids": i, "labels": i.clone(), "attention_mask": torch.ones_like(i)} for i in ids
    ]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 3,
        "learning_rate": 5e-2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 1,
    }
    return TrainingArguments(**given | options)


def trainer(
    folder: Path,
    callback: gr.CapacityCallback | None = None,
    model: Any = None,
    prepare: bool = True,
    extra: list[TrainerCallback] | None = None,
    **options: Any,
) -> Any:
    callback = callback or gr.CapacityCallback(method(), f"uniform:{RANK}")
    made = Trainer(
        model=model if model is not None else adapted(),
        args=arguments(folder, **options),
        train_dataset=rows(),  # pyright: ignore[reportArgumentType]
        eval_dataset=rows(6, seed=9),  # pyright: ignore[reportArgumentType]
        callbacks=[callback, *(extra or [])],
    )
    made.capacity = callback  # pyright: ignore[reportAttributeAccessIssue]
    return gr.prepare_trainer(made) if prepare else made


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows(1, seed=5)[0]["input_ids"][None]).logits


def reloaded(folder: Path) -> Any:
    """What stock PEFT makes of a folder, without gradrank."""
    return PeftModel.from_pretrained(CASES["llama"].model(), folder)


def ranks_on_disk(folder: Path) -> dict[str, int]:
    weights = load_file(folder / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    return {
        key.removeprefix(prefix).removesuffix(suffix): tensor.shape[0]
        for key, tensor in weights.items()
        if key.endswith(suffix)
    }


class Look(TrainerCallback):
    """Notes parameters in use and logits at the end of every step."""

    def __init__(self) -> None:
        self.parameters: list[int] = []
        self.logits: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.parameters.append(parameters(model))
        training = model.training
        self.logits.append(logits(model))
        model.train(training)


# --- ranks move --------------------------------------------------------------------------------


def test_ranks_move_and_every_save_loads_in_stock_peft(tmp_path: Path) -> None:
    look = Look()
    made = trainer(tmp_path, extra=[look], save_strategy="steps", save_steps=1)
    assert hooks(made.model) == 0
    made.train()
    run = made.capacity.run
    assert [entry["step"] for entry in run.decisions] == DUE
    assert len(set(run.ranks.values())) > 1
    assert len(look.parameters) == STEPS
    assert max(look.parameters) <= run.budget
    assert hooks(made.model) == 0
    made.model.save_pretrained(tmp_path / "final")
    made.save_model(str(tmp_path / "saved"))
    found = {}
    for step in range(1, STEPS + 1):
        folder = tmp_path / f"checkpoint-{step}"
        assert torch.equal(logits(reloaded(folder)), look.logits[step - 1]), step
        found[step] = ranks_on_disk(folder)
    assert len({tuple(ranks.values()) for ranks in found.values()}) > 2
    for folder in ("final", "saved"):
        assert torch.equal(logits(reloaded(tmp_path / folder)), logits(made.model))
        assert ranks_on_disk(tmp_path / folder) == run.ranks
    assert made.capacity.ranks_over_time[0][1] == dict.fromkeys(run.ranks, RANK)
    assert made.capacity.decisions is run.decisions


def test_the_callback_alone_is_enough_to_train(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", prepare=False)
    plain.train()
    prepared = trainer(tmp_path / "b")
    prepared.train()
    assert plain.capacity.run.ranks == prepared.capacity.run.ranks
    assert same_tensors(adapter_weights(plain.model), adapter_weights(prepared.model))


def test_the_trainer_gives_what_a_plain_loop_gives(tmp_path: Path) -> None:
    options = {"weight_decay": 0.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    made = trainer(tmp_path, **options)
    seen: list[dict[str, Tensor]] = []
    compute = made.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append({key: value.clone() for key, value in inputs.items()})
        return compute(model, inputs, *args, **kwargs)

    made.compute_loss = compute_loss
    made.train()
    model = adapted()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=5e-2, weight_decay=0.0
    )
    with gr.Controller(model, optimizer, method(), f"uniform:{RANK}", STEPS) as controller:
        for batch in seen:
            model(**batch).loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
    assert controller.run.ranks_over_time == made.capacity.ranks_over_time
    theirs = adapter_weights(made.model)
    for name, weight in adapter_weights(model).items():
        # The Trainer sums losses in another order; Adam magnifies that for small gradients.
        assert float((weight - theirs[name]).norm() / weight.norm()) < 1e-2, name


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        checkpointing_arguments(True),
        {"bf16": True},
        {"optim": "adafactor"},
        {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"num_train_epochs": 1, "max_steps": -1},
    ],
    ids=["accumulate", "checkpoint", "bf16", "adafactor", "clip", "epoch"],
)
def test_ranks_move_in_every_setting(options: dict[str, Any], tmp_path: Path) -> None:
    look = Look()
    made = trainer(tmp_path, extra=[look], **options)
    made.train()
    run = made.capacity.run
    assert [entry["step"] for entry in run.decisions] == DUE
    assert len(run.ranks_over_time) > 1
    assert max(look.parameters) <= run.budget
    assert all(torch.isfinite(p).all() for p in made.model.parameters())
    made.model.save_pretrained(tmp_path / "final")
    again = reloaded(tmp_path / "final")
    assert same_tensors(adapter_weights(again), adapter_weights(made.model))
    if not options.get("bf16"):  # the Trainer leaves its model under autocast
        assert torch.equal(logits(again), logits(made.model))


def test_evaluating_every_step_changes_nothing(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a")
    plain.train()
    evaluated = trainer(tmp_path / "b", eval_strategy="steps", eval_steps=1)
    evaluated.train()
    assert same_tensors(adapter_weights(plain.model), adapter_weights(evaluated.model))


# --- resume ------------------------------------------------------------------------------------


def timeless(callback: gr.CapacityCallback) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "seconds"} for e in callback.decisions]


@pytest.mark.parametrize(
    ("grow", "steps"),
    [("random", range(1, STEPS)), ("gradient", (2, 5))],
    ids=["random", "gradient"],
)
def test_resuming_from_every_checkpoint_equals_the_uninterrupted_run(
    grow: str, steps: Sequence[int], tmp_path: Path
) -> None:
    def fresh(folder: Path, save_strategy: str) -> Any:
        callback = gr.CapacityCallback(method(grow=grow), f"uniform:{RANK}")
        model = adapted(lora_dropout=0.1)
        return trainer(folder, callback, model, save_strategy=save_strategy, save_steps=1)

    whole = fresh(tmp_path, "steps")
    whole.train()
    weights, ranks = adapter_weights(whole.model), whole.capacity.run.ranks
    assert len(set(ranks.values())) > 1
    for step in steps:
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        again = fresh(folder, "no")
        again.train(resume_from_checkpoint=True)
        assert again.capacity.run.ranks == ranks, step
        assert same_tensors(adapter_weights(again.model), weights), step
        assert timeless(again.capacity) == timeless(whole.capacity)
        assert again.capacity.ranks_over_time == whole.capacity.ranks_over_time
        assert hooks(again.model) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every step of one run."""
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder, save_strategy="steps", save_steps=1).train()
    return folder


@pytest.fixture
def checkpoints(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_a_finished_run_resumed_has_nothing_to_do_and_keeps_its_story(checkpoints: Path) -> None:
    made = trainer(checkpoints)
    made.train(resume_from_checkpoint=True)
    facts, _ = sidecar.read(checkpoints / f"checkpoint-{STEPS}" / sidecar.FILE)
    assert made.capacity.ranks_over_time == facts["ranks_over_time"]
    assert [entry["step"] for entry in made.capacity.decisions] == DUE
    assert ranks_on_disk(checkpoints / f"checkpoint-{STEPS}") == facts["ranks"]


def test_without_preparing_a_resume_fails_loudly(checkpoints: Path) -> None:
    unprepared = trainer(checkpoints, prepare=False)
    # Ranks differ by now: PEFT itself cannot load them.
    with pytest.raises(RuntimeError, match="size mismatch"):
        unprepared.train(resume_from_checkpoint=str(checkpoints / "checkpoint-6"))
    # They do not differ yet: nothing but the callback would notice.
    early = trainer(checkpoints, prepare=False)
    assert set(ranks_on_disk(checkpoints / "checkpoint-1").values()) == {RANK}
    with pytest.raises(gr.SurgeryError, match=r"Call gradrank\.prepare_trainer\(trainer\) before"):
        early.train(resume_from_checkpoint=str(checkpoints / "checkpoint-1"))


def test_unfinished_checkpoints_are_skipped_and_refused_by_name(checkpoints: Path) -> None:
    last, before, good = (checkpoints / f"checkpoint-{step}" for step in (8, 7, 6))
    (last / marker.MARKER).unlink()
    path = before / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert get_last_checkpoint(str(checkpoints)) == str(last)
    assert marker.last_complete(checkpoints, sidecar.FILE) == good
    for folder in (last, before):
        with pytest.raises(gr.DataError, match=rf"'{folder.name}' is not whole.*'checkpoint-6'"):
            trainer(checkpoints).train(resume_from_checkpoint=str(folder))
    resumed = trainer(checkpoints)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    facts, _ = sidecar.read(good / sidecar.FILE)
    assert (
        resumed.capacity.ranks_over_time[: len(facts["ranks_over_time"])]
        == (facts["ranks_over_time"])
    )


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "rng_state.pth"])
def test_any_file_cut_off_makes_a_checkpoint_unfinished(name: str, checkpoints: Path) -> None:
    path = checkpoints / "checkpoint-8" / name
    path.write_bytes(path.read_bytes()[:-1])
    assert not marker.is_complete(checkpoints / "checkpoint-8", sidecar.FILE)
    assert marker.last_complete(checkpoints, sidecar.FILE) == checkpoints / "checkpoint-7"


def test_where_no_checkpoint_is_whole_resuming_says_so(tmp_path: Path) -> None:
    with pytest.raises(gr.DataError, match="there is no whole checkpoint in"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(gr.DataError, match=r"'checkpoint-3' is not whole.*There is no whole one"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_resuming_with_other_options_is_refused_by_name(checkpoints: Path) -> None:
    other = trainer(checkpoints, gr.CapacityCallback(method(beta=0.25), f"uniform:{RANK}"))
    with pytest.raises(gr.OptionError, match="made with other settings: options"):
        other.train(resume_from_checkpoint=True)
    assert hooks(other.model) == 0


def test_the_best_model_is_loaded_with_its_own_ranks(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "pick"}
    look = Look()
    made = trainer(tmp_path, extra=[look], **options)
    made.compute_metrics = lambda _: {"pick": float(made.state.global_step == 3)}
    made.train()
    best = tmp_path / "checkpoint-3"
    assert Path(made.state.best_model_checkpoint) == best
    wanted = ranks_on_disk(best)
    assert wanted != ranks_on_disk(tmp_path / f"checkpoint-{STEPS}"), "the test shows nothing"
    assert made.capacity.run.ranks == wanted
    assert torch.equal(logits(made.model), look.logits[2])
    assert torch.equal(logits(made.model), logits(reloaded(best)))
    made.model.save_pretrained(tmp_path / "best")
    assert ranks_on_disk(tmp_path / "best") == wanted
    assert torch.equal(logits(reloaded(tmp_path / "best")), logits(made.model))


# --- what goes wrong is told -------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_stopping_before_the_first_decision_warns(tmp_path: Path) -> None:
    made = trainer(tmp_path, extra=[StopAt(1)])
    with pytest.warns(UserWarning, match=r"ended after step 1, and the first .* after step 2"):
        made.train()
    assert hooks(made.model) == 0
    assert set(made.capacity.run.ranks.values()) == {RANK}


def test_stopping_later_is_no_fault(tmp_path: Path) -> None:
    made = trainer(tmp_path, extra=[StopAt(3)])
    made.train()
    assert [entry["step"] for entry in made.capacity.decisions] == [2]


def test_keeping_one_checkpoint_only_is_warned_about(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=4, save_total_limit=1)
    with pytest.warns(UserWarning, match=r"save_total_limit=1 .* Use 2"):
        made.train()
    twice = trainer(tmp_path, save_strategy="steps", save_steps=4, save_total_limit=2)
    twice.train()


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(gr.OptionError, match="'gard' decides once"):
        gr.CapacityCallback("gard")
    late = trainer(tmp_path, gr.CapacityCallback(method(interval=50), "uniform:4"))
    with pytest.raises(gr.OptionError, match=r"would never move any capacity: in 8 steps"):
        late.train()
    poor = trainer(tmp_path, gr.CapacityCallback(method(), "uniform:2"))
    with pytest.raises(gr.BudgetError, match="more than the budget"):
        poor.train()
    bare = gr.CapacityCallback(method())
    with pytest.raises(gr.SurgeryError, match="carries no PEFT adapter"):
        trainer(tmp_path, bare, CASES["llama"].model())


def test_compiling_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(gr.GradrankError, match="compile"):
        made.train()


def test_an_error_in_training_leaves_no_hooks_behind(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError

    made = trainer(tmp_path, extra=[Fails()])
    with pytest.raises(ZeroDivisionError):
        made.train()
    made.capacity.close()
    assert hooks(made.model) == 0


def test_a_trainer_takes_one_callback_and_is_prepared_once(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    with pytest.raises(gr.OptionError, match="prepared once"):
        gr.prepare_trainer(made)
    with pytest.raises(gr.OptionError, match="takes one CapacityCallback"):
        trainer(tmp_path, extra=[gr.CapacityCallback(method())])


def test_a_method_by_name_takes_options(tmp_path: Path) -> None:
    callback = gr.CapacityCallback("gard-dynamic", f"uniform:{RANK}", options=OPTIONS)
    assert callback.method == method()
    made = trainer(tmp_path, callback)
    made.train()
    assert [entry["step"] for entry in callback.decisions] == DUE


def test_training_twice_begins_again(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    first = made.capacity.run
    made.train()
    assert made.capacity.run is not first
    assert [entry["step"] for entry in made.capacity.decisions] == DUE
    assert hooks(made.model) == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL 1.16 uses names that v5 renamed
def test_trls_trainer_takes_the_callback(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    options = {"use_cpu": True, "bf16": False, "max_steps": STEPS, "per_device_train_batch_size": 3}
    options |= {"learning_rate": 5e-2, "report_to": "none", "disable_tqdm": True}
    options |= {"save_strategy": "steps", "save_steps": 4, "dataloader_pin_memory": False}

    def make() -> Any:
        made = trl.SFTTrainer(
            model=adapted(),
            args=trl.SFTConfig(output_dir=str(tmp_path), **options),
            train_dataset=datasets.Dataset.from_list(
                [{"input_ids": row["input_ids"].tolist()} for row in rows()]
            ),
            processing_class=tokenizer(),
            callbacks=[gr.CapacityCallback(method(), f"uniform:{RANK}")],
        )
        return gr.prepare_trainer(made)

    made = make()
    made.train()
    ranks = ranks_on_disk(tmp_path / f"checkpoint-{STEPS}")
    assert len(set(ranks.values())) > 1
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    again = make()
    again.train(resume_from_checkpoint=True)
    assert ranks_on_disk(tmp_path / f"checkpoint-{STEPS}") == ranks
    assert same_tensors(adapter_weights(again.model), adapter_weights(made.model))


def tokenizer() -> Any:
    """Words ``w3`` and so on, as many as the tiny models know."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = importlib.import_module("transformers")
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
