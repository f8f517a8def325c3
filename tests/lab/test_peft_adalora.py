"""PEFT's own AdaLoRA: matched scale, driven once per step, counted, and loud when it is not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from cases import CASES, VOCABULARY, batches
from gradrank.core.errors import BudgetError, OptionError, SurgeryError
from gradrank.core.targets import Target, cost_of_rank_one
from gradrank.lab.adalora import adalora_config, adalora_use, choose_target_rank
from gradrank.lab.adalora_run import AdaLoraCallback, AdaLoraDriver
from gradrank.lab.settings import TrainSettings
from gradrank.lab.train import train
from gradrank.signals.facts import find_targets

INITIAL, TARGET, STEPS, SCALING = 6, 2, 10, 1.7
SCHEDULE: dict[str, Any] = {
    "initial_rank": INITIAL,
    "target_rank": TARGET,
    "total_steps": STEPS,
    "warmup": 2,
    "final": 3,
    "interval": 2,
    "scaling": SCALING,
}
# Pruned after the multiples of the interval in 3..7, and after the last step before the final ones.
DUE = [4, 6, 7]
# peft 0.21.2 takes a target whose directions are all gone for a shard that was not gathered, and
# reads AdaLoRA's rank_pattern as if it were LoRA's, though it uses it rightly afterwards.
saving_warns = pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape")
loading_warns = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")


def wrapped(case: str = "llama", **options: Any) -> Any:
    base = CASES[case].model()
    torch.manual_seed(1)
    config = adalora_config(find_targets(base), **SCHEDULE | options)
    return get_peft_model(base, config).train()  # pyright: ignore[reportArgumentType]


def optimizer_of(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def trained(
    model: Any, steps: int = STEPS, case: str = "llama", driver: AdaLoraDriver | None = None
) -> AdaLoraDriver:
    driver = driver or AdaLoraDriver(model)
    optimizer = optimizer_of(model)
    for batch in batches(CASES[case], steps):
        model(**batch).loss.backward()
        optimizer.step()
        driver.step()
        optimizer.zero_grad()
    return driver


def logits(model: Any, case: str = "llama") -> Tensor:
    inputs = {n: v for n, v in batches(CASES[case], 1, seed=5)[0].items() if n != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs).logits


def stock_twin(model: Any, scaling: float, case: str = "llama") -> Any:
    """A stock LoRA of the initial rank with the factors B and diag(λ) A of an AdaLoRA."""
    base = CASES[case].model()
    config = LoraConfig(
        r=INITIAL,
        lora_alpha=scaling * INITIAL,  # pyright: ignore[reportArgumentType]
        target_modules=[target.name for target in find_targets(base)],
        fan_in_fan_out=case == "gpt2",
    )
    twin = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for name, layer in twin.named_modules():
            if hasattr(layer, "lora_A") and hasattr(layer, "scaling"):
                source = model.get_submodule(name)
                a = source.lora_E["default"] * source.lora_A["default"]
                layer.lora_A["default"].weight.copy_(a)  # pyright: ignore
                layer.lora_B["default"].weight.copy_(source.lora_B["default"])  # pyright: ignore
    return twin


@pytest.mark.parametrize("name", sorted(CASES))
def test_ranks_fall_to_the_target_on_every_architecture(name):
    model = wrapped(name)
    driver = trained(model, case=name)
    final = driver.finish()
    assert sum(final.ranks.values()) == TARGET * len(final.ranks)
    assert len(set(final.ranks.values())) > 1  # adaptive, not uniform
    assert [decision["step"] for decision in driver.decisions] == DUE
    assert driver.ranks_over_time[0] == [0, dict.fromkeys(final.ranks, INITIAL)]
    assert driver.ranks_over_time[-1][1] == final.ranks


def test_parameters_are_counted_by_target_at_peak_and_in_the_end():
    model = wrapped()
    targets = find_targets(CASES["llama"].model())
    assert adalora_use(model).total == 0  # every λ is zero before the first step
    driver = trained(model)
    final = driver.finish()
    assert final.parameters == {t.name: final.ranks[t.name] * t.cost for t in targets}
    assert final.total == sum(final.parameters.values()) == driver.decisions[-1]["parameters"]
    assert driver.peak == INITIAL * cost_of_rank_one(targets)
    # Nothing shrinks: λ and pruned directions are still there, and still trained.
    assert final.held == INITIAL * (cost_of_rank_one(targets) + len(targets))
    assert final.held == sum(p.numel() for p in model.parameters() if p.requires_grad)
    budgets = [decision["rank_budget"] for decision in driver.decisions]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == TARGET * len(targets)


def test_pruned_directions_come_back_before_the_final_phase_and_not_in_it():
    model = wrapped()
    driver = trained(model, 4)
    assert sum(adalora_use(model).ranks.values()) == driver.decisions[-1]["rank_budget"]
    optimizer = optimizer_of(model)
    counts = []
    for batch in batches(CASES["llama"], STEPS - 4, seed=3):
        model(**batch).loss.backward()
        optimizer.step()
        driver.step()
        optimizer.zero_grad()
        counts.append(sum(adalora_use(model).ranks.values()))
    whole, target = INITIAL * len(driver.ranks_over_time[0][1]), driver.decisions[-1]["rank_budget"]
    assert counts[0] == whole  # step 5: all λ moved again
    assert counts[3:] == [target] * 3  # steps 8 to 10


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("steps", [3, STEPS])
def test_the_same_factors_give_the_logits_of_stock_lora_of_that_scaling(name, steps):
    model = wrapped(name)
    trained(model, steps, name)  # before any pruning, and with most directions gone
    found = logits(model, name)
    assert torch.allclose(found, logits(stock_twin(model, SCALING, name), name), atol=1e-6)
    # A divisor that followed the ranks, or a slightly other scale, would be noticed.
    assert not torch.allclose(found, logits(stock_twin(model, 1.01 * SCALING, name), name))
    without = logits(CASES[name].model(), name)
    assert not torch.allclose(found, without, atol=1e-3)


def test_defaults_of_peft_make_a_smaller_update_than_lora():
    base = CASES["llama"].model()
    config = AdaLoraConfig(init_r=12, total_step=STEPS, target_modules=["q_proj"])
    model = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] / float(layer.ranknum["default"]) == pytest.approx(8 / 12)


@saving_warns
@loading_warns
def test_a_finished_adapter_loads_with_the_same_scale(tmp_path):
    model = wrapped()
    trained(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(CASES["llama"].model(), tmp_path)  # pyright: ignore
    assert torch.allclose(logits(loaded), expected, atol=1e-6)


@saving_warns
@loading_warns
def test_a_save_before_the_final_phase_is_another_function(tmp_path):
    model = wrapped()
    trained(model, 5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(CASES["llama"].model(), tmp_path)  # pyright: ignore
    assert not torch.allclose(logits(loaded), expected, atol=1e-5)


def rows(count: int = 48) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCABULARY, (7,), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": i.clone()} for i in ids]


def trainer(folder: Path, model: Any, callbacks: list[Any], **options: Any) -> Trainer:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**given | options),
        train_dataset=rows(),  # pyright: ignore[reportArgumentType]
        callbacks=callbacks,
    )


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_callback_calls_once_per_optimizer_step(tmp_path, monkeypatch, accumulation):
    model = wrapped()
    called: list[tuple[int, bool]] = []
    original = model.base_model.update_and_allocate

    def spy(step: int) -> None:
        called.append((step, all(p.grad is not None for p in trainable)))
        original(step)

    trainable = [p for p in model.parameters() if p.requires_grad]
    monkeypatch.setattr(model.base_model, "update_and_allocate", spy)
    callback = AdaLoraCallback()
    trainer(tmp_path, model, [callback], gradient_accumulation_steps=accumulation).train()
    assert called == [(step, True) for step in range(1, STEPS + 1)]
    assert [decision["step"] for decision in callback.decisions] == DUE
    assert callback.final == callback.finish()
    assert callback.final is not None
    assert sum(callback.final.ranks.values()) == TARGET * len(callback.final.ranks)


def test_trainer_and_plain_loop_prune_alike(tmp_path):
    model, plain = wrapped(), wrapped()
    ids: list[Tensor] = []
    keep = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: ids.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    callback = AdaLoraCallback()
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.01}
    trainer(tmp_path, model, [callback], **options).train()
    keep.remove()
    driver, optimizer = AdaLoraDriver(plain), optimizer_of(plain)
    for batch in ids:
        plain(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        driver.step()
        optimizer.zero_grad()
    assert driver.finish() == callback.final
    assert driver.ranks_over_time == callback.ranks_over_time


def test_the_lab_trains_with_it(prepare, tmp_path):
    lora, data = prepare()
    base = lora.unload()
    config = adalora_config(find_targets(base), **SCHEDULE, task_type="CAUSAL_LM")
    callback: Any = AdaLoraCallback()
    settings = TrainSettings(steps=STEPS, batch_size=2, accumulation=2, lr=1e-2)
    shapes = [base.get_submodule(target.name).weight.shape for target in find_targets(base)]
    model = get_peft_model(base, config)
    outcome = train(model, data, settings, tmp_path, capacity=callback)
    assert (outcome.status, outcome.message) == ("finished", "")
    assert [decision["step"] for decision in outcome.decisions] == DUE
    assert outcome.ranks_over_time[-1][1] == callback.final.ranks
    # Factors of the initial rank on every target; λ goes into one of them and is not counted.
    assert outcome.adapter_parameters == INITIAL * sum(d_out + d_in for d_out, d_in in shapes)


def test_a_trainer_without_the_callback_is_noticed(tmp_path):
    callback, model = AdaLoraCallback(), wrapped()
    trainer(tmp_path, model, []).train()
    with pytest.raises(SurgeryError, match="saw no training, so that no rank was pruned"):
        callback.finish()
    assert set(adalora_use(model).ranks.values()) == {INITIAL}


def test_a_loop_that_never_calls_is_noticed():
    with pytest.raises(SurgeryError, match="never driven"):
        AdaLoraDriver(wrapped()).finish()


def test_a_loop_that_stops_early_is_noticed():
    driver = trained(wrapped(), DUE[-1] - 1)
    with pytest.raises(SurgeryError, match=r"after 6 steps 2 allocations.*belongs to step 7 of 10"):
        driver.finish()
    trained(driver.model, 1, driver=driver)
    assert driver.finish().total > 0


def test_a_callback_that_missed_steps_stops_the_run(tmp_path):
    class Late(AdaLoraCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step:
                super().on_optimizer_step(args, state, control, **kwargs)

    with pytest.raises(SurgeryError, match="called in 0 of 1 optimizer steps"):
        trainer(tmp_path, wrapped(), [Late()]).train()


def test_an_interrupted_run_warns_and_is_counted(tmp_path):
    class Stop(AdaLoraCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            control.should_training_stop = state.global_step == 5

    callback = Stop()
    with pytest.warns(UserWarning, match="did not reach its target: after 5 steps"):
        trainer(tmp_path, wrapped(), [callback]).train()
    assert callback.final is not None


def test_a_schedule_of_another_length_is_refused(tmp_path):
    with pytest.raises(OptionError, match="is for 10 steps and the Trainer will take 12"):
        trainer(tmp_path, wrapped(), [AdaLoraCallback()], max_steps=12).train()


@saving_warns
def test_resuming_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, wrapped(), [AdaLoraCallback()], **options).train()
    resumed = trainer(tmp_path, wrapped(), [AdaLoraCallback()])
    with pytest.raises(SurgeryError, match="cannot go on at step 2"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_calling_after_zero_grad_is_refused():
    model = wrapped()
    driver, optimizer = AdaLoraDriver(model), optimizer_of(model)
    model(**batches(CASES["llama"], 1)[0]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(SurgeryError, match=r"q_proj' has no gradient.*before zero_grad"):
        driver.step()


def test_gradients_of_zero_that_prune_everything_are_noticed():
    model = wrapped()
    driver, optimizer = AdaLoraDriver(model), optimizer_of(model)

    def run() -> None:
        for batch in batches(CASES["llama"], STEPS):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            driver.step()

    with pytest.raises(SurgeryError, match="pruned every direction after step 4"):
        run()


def test_a_skipped_step_leaves_the_averages_finite():
    model = wrapped()
    driver, optimizer = AdaLoraDriver(model), optimizer_of(model)
    for number, batch in enumerate(batches(CASES["llama"], STEPS)):
        model(**batch).loss.backward()
        skipped = number == 2
        if skipped:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
        else:
            optimizer.step()
        driver.step(skipped)
        scores = model.base_model.rankallocator.exp_avg_ipt.values()
        assert all(bool(score.isfinite().all()) for score in scores)
        optimizer.zero_grad()
    assert sum(driver.finish().ranks.values()) == TARGET * len(driver.ranks_over_time[0][1])


def test_counting_from_zero_without_a_final_phase_would_miss_the_target():
    """Why steps are counted from 1: PEFT's last allocation belongs to step total - tfinal."""
    ranks = []
    for first in (0, 1):
        model = wrapped(final=0)
        optimizer = optimizer_of(model)
        for number, batch in enumerate(batches(CASES["llama"], STEPS), start=first):
            model(**batch).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(number)
            optimizer.zero_grad()
        ranks.append(sum(adalora_use(model).ranks.values()))
    assert ranks[1] == TARGET * len(adalora_use(model).ranks) < ranks[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rank": INITIAL}, "target_rank 6 is not below initial_rank 6"),
        ({"target_rank": 0}, "target_rank 0"),
        ({"warmup": 7}, "warmup 7 and final 3 leave none of 10 steps"),
        ({"warmup": -1}, "warmup -1"),
        ({"interval": 0}, "interval 0"),
        ({"beta2": 1.0}, "beta2 1.0"),
        ({"orthogonality": -0.1}, "orthogonality -0.1"),
        ({"scaling": 0.0}, "scaling 0.0"),
        ({"lora_alpha": 8, "use_rslora": True}, "lora_alpha, use_rslora"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        wrapped(**options)


def test_no_targets_and_no_adalora_are_refused():
    with pytest.raises(OptionError, match="no targets"):
        adalora_config([], **SCHEDULE)
    plain = CASES["llama"].model()
    with pytest.raises(OptionError, match="LlamaForCausalLM carries no trainable AdaLoRA"):
        adalora_use(plain)
    lora = get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))  # pyright: ignore
    with pytest.raises(OptionError, match="no trainable AdaLoRA"):
        AdaLoraDriver(lora)


def test_names_that_share_a_suffix_are_told_apart():
    base = CASES["llama"].model()
    chosen = [t for t in find_targets(base) if t.name.endswith("layers.1.self_attn.q_proj")]
    config = adalora_config(chosen, **SCHEDULE)
    model = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    assert list(adalora_use(model).ranks) == [chosen[0].name]


def costliest(targets: list[Target], ranks: int, most: int) -> int:
    """Slow twin: the dearest way to place so many ranks, by trying one rank at a time."""
    slots = sorted((t.cost for t in targets for _ in range(most)), reverse=True)
    return sum(slots[:ranks])


@given(
    shapes=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=6),
    initial=st.integers(2, 9),
    budget=st.integers(1, 5000),
    strict=st.booleans(),
)
def test_the_target_rank_is_the_largest_that_fits(shapes, initial, budget, strict):
    targets = [Target(f"t{i}", *shape) for i, shape in enumerate(shapes)]

    def price(rank: int) -> int:
        if strict:
            return costliest(targets, rank * len(targets), initial)
        return rank * cost_of_rank_one(targets)

    fitting = [rank for rank in range(1, initial) if price(rank) <= budget]
    if not fitting:
        with pytest.raises(BudgetError, match="not enough for a mean rank of 1"):
            choose_target_rank(targets, initial, budget, strict=strict)
        return
    found = choose_target_rank(targets, initial, budget, strict=strict)
    assert found.rank == max(fitting)
    assert found.uniform == found.rank * cost_of_rank_one(targets)
    assert found.worst == costliest(targets, found.rank * len(targets), initial) >= found.uniform
    assert found.guaranteed == (found.worst <= budget)
    assert found.guaranteed or not strict


def test_a_strict_target_rank_keeps_the_budget():
    targets = find_targets(CASES["llama"].model())
    budget = 3 * cost_of_rank_one(targets)
    chosen = choose_target_rank(targets, INITIAL, "uniform:3", strict=True)
    assert chosen.budget == budget
    assert chosen.rank < choose_target_rank(targets, INITIAL, budget).rank == 3
    assert trained(wrapped(target_rank=chosen.rank)).finish().total <= budget
    with pytest.raises(OptionError, match="initial_rank is 1"):
        choose_target_rank(targets, 1, budget)
