"""One run of a grid: its record, its pairing with others, and what runs share."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from gradrank.lab.compare.bench import Bench, warm_head, warmed
from gradrank.lab.compare.carry import carry_out
from gradrank.lab.compare.grid import GridRun, final_runs, stability_runs, tuning_runs
from gradrank.lab.compare.recipe import Recipe
from gradrank.lab.evaluate import evaluate
from gradrank.lab.recipes import read
from gradrank.record import RunRecord

RUN = {
    "model": "tiny-llama",
    "task": "tiny-lm",
    "steps": 3,
    "batch_size": 4,
    "batches": 4,
    "max_length": 16,
    "validation": 30,
    "eval_examples": 20,
    "lr": 1e-3,
}


def recipe_of(folder: Path, **changes: object) -> Recipe:
    data = {
        "schema": "gradrank.recipe/1",
        "name": "one",
        "about": "a question",
        "source": "a paper",
        "run": RUN,
        "budgets": ["uniform:2"],
        "seeds": [0],
        "methods": ["uniform", "gard", "waterfill", "random"],
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return read(path)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "cache")


def carried(run: GridRun, recipe: Recipe, bench: Bench) -> RunRecord:
    record = carry_out(run, recipe, bench)
    # What is written is what others read.
    return RunRecord.from_dict(record.to_dict())


def test_a_record_says_what_the_run_was_and_what_it_predicted(tmp_path: Path, bench: Bench) -> None:
    recipe = recipe_of(tmp_path)
    for run in final_runs(recipe, {}):
        record = carried(run, recipe, bench)
        about = record.comparison
        assert record.status == "finished"
        assert about is not None
        assert about["run"] == run.id
        assert about["metric"] == "eval_loss"
        assert record.items is not None
        nll, count = record.items["nll"], record.items["count"]
        assert sum(nll) / sum(count) == pytest.approx(record.metrics["eval_loss"], rel=1e-5)
        used = record.trainable_parameters
        assert 0 < used["final"] <= used["peak"] <= about["budget_parameters"]
        assert (record.cost["measure_seconds"] > 0) == (run.label in {"gard", "waterfill"})
        assert record.ranks_over_time[-1][1]


def test_one_pass_measures_for_every_method_of_a_seed(tmp_path: Path, bench: Bench) -> None:
    recipe = recipe_of(tmp_path, budgets=["uniform:1", "uniform:2"], seeds=[0, 1])
    for run in final_runs(recipe, {}):
        if run.label in {"gard", "waterfill"}:
            carried(run, recipe, bench)
    assert len(list(bench.cache.glob("*.safetensors"))) == 2  # one per seed


def test_a_shared_measurement_gives_the_plan_of_an_own_one(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, methods=["uniform", "gard"])
    gard = next(run for run in final_runs(recipe, {}) if run.label == "gard")
    alone = carried(gard, recipe, Bench(tmp_path / "a"))
    shared = Bench(tmp_path / "b")
    other = recipe_of(tmp_path, methods=["uniform", "waterfill"])
    carried(final_runs(other, {})[1], other, shared)
    again = carried(gard, recipe, shared)
    assert again.ranks_over_time == alone.ranks_over_time
    assert again.metrics == alone.metrics


def test_runs_of_a_seed_are_paired_and_repeatable(tmp_path: Path, bench: Bench) -> None:
    recipe = recipe_of(tmp_path, seeds=[0, 1], methods=["uniform", "random"])
    runs = final_runs(recipe, {})
    first = carried(runs[0], recipe, bench)
    again = carried(runs[0], recipe, Bench(tmp_path / "other"))
    assert again.losses == first.losses
    assert again.items == first.items
    # B is zero at the start: two arms of one seed see the same first batch and the same loss.
    random = carried(runs[1], recipe, bench)
    assert random.losses["train"][0][1] == pytest.approx(first.losses["train"][0][1], rel=1e-6)
    other = carried(runs[2], recipe, bench)
    assert other.losses["train"][0][1] != first.losses["train"][0][1]


def test_rates_are_chosen_on_examples_that_are_not_reported(tmp_path: Path, bench: Bench) -> None:
    recipe = recipe_of(tmp_path, learning_rates=[1e-3, 1e-2], methods=["uniform"])
    fresh = {
        split: bench.load(recipe.config(recipe.tasks[0], recipe.variants[0]), split, 0)
        for split in ("validation", "test")
    }

    def blocks(data: object) -> set[tuple[int, ...]]:
        return {tuple(data[i]["input_ids"].tolist()) for i in range(len(data))}  # pyright: ignore

    chosen, reported = (fresh[split].data for split in ("validation", "test"))
    assert blocks(chosen.train) == blocks(reported.train)
    tuned = carried(tuning_runs(recipe)[0], recipe, bench)
    final = carried(final_runs(recipe, {})[0], recipe, bench)
    assert tuned.items is not None
    assert final.items is not None
    # Likelihoods differ by rate and seed anyway; the checksum is of nothing but what was read.
    model = fresh["test"].loaded.model
    assert tuned.items["digest"] == evaluate(model, chosen).outcomes["digest"]
    assert final.items["digest"] == evaluate(model, reported).outcomes["digest"]
    assert tuned.items["digest"] != final.items["digest"]


def test_a_record_says_how_much_of_the_split_was_looked_at(tmp_path: Path, bench: Bench) -> None:
    recipe = recipe_of(tmp_path, run={**RUN, "eval_batches": 2}, methods=["uniform"])
    about = carried(final_runs(recipe, {})[0], recipe, bench).comparison
    assert about is not None
    assert about["data"]["eval_examples"] > 8
    assert about["data"]["evaluated_examples"] == 8
    assert about["data"]["evaluated_items"] == 8 * 15


def test_an_arm_that_cannot_be_is_a_failed_record(tmp_path: Path, bench: Bench) -> None:
    recipe = recipe_of(tmp_path, budgets=[600], methods=["uniform", "bitfit"])
    for run in final_runs(recipe, {}):
        record = carried(run, recipe, bench)
        assert record.status == "failed"
        assert record.comparison is not None
        assert record.comparison["message"]
        assert record.metrics == {}


def test_other_calibrations_only_allocate(tmp_path: Path, bench: Bench) -> None:
    recipe = recipe_of(tmp_path, calibration_seeds=[5, 6], methods=["uniform", "waterfill"])
    records = [carried(run, recipe, bench) for run in stability_runs(recipe)]
    assert [record.kind for record in records] == ["plan", "plan"]
    assert [record.seeds["calibration"] for record in records] == [5, 6]
    assert not any(record.metrics for record in records)


HEADED = {**RUN, "model": "tiny-bert", "task": "tiny-sentiment"}


def test_calibrations_are_compared_anew_where_runs_share_a_fixed_one(
    tmp_path: Path, bench: Bench
) -> None:
    recipe = recipe_of(
        tmp_path,
        run={**HEADED, "calibration_seed": 7},
        calibration_seeds=[5, 6],
        methods=["uniform", "waterfill"],
    )
    records = [carried(run, recipe, bench) for run in stability_runs(recipe)]
    assert [record.seeds["calibration"] for record in records] == [5, 6]
    assert len(list(bench.cache.glob("*.safetensors"))) == 2


def test_a_plan_does_not_depend_on_which_run_measured_first(tmp_path: Path) -> None:
    """A new head is of the run's seed, and gradients pass through it."""
    recipe = recipe_of(
        tmp_path,
        run={**HEADED, "calibration_seed": 7},
        seeds=[0, 1],
        methods=["waterfill"],
        reference="waterfill",
    )
    first, second = final_runs(recipe, {})
    alone = carried(second, recipe, Bench(tmp_path / "alone"))
    shared = Bench(tmp_path / "shared")
    carried(first, recipe, shared)
    after = carried(second, recipe, shared)
    assert (after.ranks_over_time, after.metrics) == (alone.ranks_over_time, alone.metrics)
    assert len(list(shared.cache.glob("*.safetensors"))) == 2


def test_runs_of_several_rates_share_a_measurement_unless_the_rate_reaches_it(
    tmp_path: Path, bench: Bench
) -> None:
    recipe = recipe_of(tmp_path, run=HEADED, methods=["waterfill"], reference="waterfill")
    config = recipe.config(recipe.tasks[0], recipe.variants[0])
    fresh = bench.load(config, "test", 0)
    for rate in (1e-3, 1e-2):
        bench.measurement(fresh, replace(config, lr=rate), recipe_signals(recipe, 0), 0)
    assert len(list(bench.cache.glob("*.safetensors"))) == 1
    for rate in (1e-3, 1e-2):
        warmed = replace(config, lr=rate, head_steps=2)
        bench.measurement(fresh, warmed, recipe_signals(recipe, 0), 0)
    assert len(list(bench.cache.glob("*.safetensors"))) == 3


def test_a_warmed_head_is_paid_for_and_warmed_alike_for_stability(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(
        tmp_path,
        run={**HEADED, "head_steps": 2},
        calibration_seeds=[5],
        methods=["uniform", "waterfill"],
    )
    cell = ("tiny-sentiment", "waterfill", "uniform:2")
    assert [run.config.lr for run in stability_runs(recipe, {cell: 0.5})] == [0.5]
    config = recipe.config(recipe.tasks[0], recipe.variants[1])
    monkeypatch.setattr("gradrank.lab.compare.bench.warm_head", lambda *_a: time.sleep(3))
    found = bench.measurement(bench.load(config, "test", 0), config, recipe_signals(recipe), 0)
    assert found.info["seconds"] >= 3


def test_a_baseline_that_starts_from_gradients_reads_a_warmed_head_too(
    tmp_path: Path, bench: Bench
) -> None:
    found = []
    for steps in (0, 5):
        recipe = recipe_of(
            tmp_path,
            run={**HEADED, "head_steps": steps, "lr": 1e-2},
            methods=["uniform", "rslora", "lora-ga"],
        )
        found.append([carried(run, recipe, bench) for run in final_runs(recipe, {})])
    (_, cold_rslora, cold), (_, warm_rslora, warm) = found
    assert cold.losses != warm.losses
    assert cold_rslora.losses == warm_rslora.losses
    # The head that is trained is the new one: only directions below it were chosen otherwise.
    assert cold.losses["train"][0][1] == pytest.approx(warm.losses["train"][0][1], rel=1e-4)


def test_a_head_in_half_precision_is_warmed_with_master_weights(
    tmp_path: Path, bench: Bench
) -> None:
    recipe = recipe_of(tmp_path, run={**HEADED, "head_steps": 4, "lr": 1e-4})
    moved = []
    for dtype in ("float32", "bfloat16"):
        config = replace(recipe.config(recipe.tasks[0], recipe.variants[0]), dtype=dtype)
        fresh = bench.load(config, "test", 0)
        weight = fresh.loaded.model.get_submodule("classifier").weight
        before = weight.detach().float().clone()
        with warmed(fresh, config, 0):
            moved.append(float((weight.detach().float() - before).abs().mean()))
            assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight.float(), before)
    # Rounding to bfloat16 at the end hides some of it; without master weights nothing moves.
    assert moved[1] == pytest.approx(moved[0], rel=0.5)


def test_a_moving_method_reports_its_peak_and_its_end(tmp_path: Path, bench: Bench) -> None:
    option = {"initial_rank": 4, "warmup": 1, "final": 1, "interval": 1, "score_every": 1}
    recipe = recipe_of(
        tmp_path,
        run={**RUN, "steps": 6},
        methods=["uniform", {"method": "igu", "option": option}],
    )
    record = carried(final_runs(recipe, {})[1], recipe, bench)
    used, about = record.trainable_parameters, record.comparison
    assert record.status == "finished"
    assert about is not None
    assert used["final"] <= about["budget_parameters"] < used["peak"]
    assert len(record.ranks_over_time) == 2


def test_a_head_warms_up_for_the_measurement_only(tmp_path: Path, bench: Bench) -> None:
    run = {**RUN, "model": "tiny-bert", "task": "tiny-sentiment", "head_steps": 5, "lr": 1e-2}
    recipe = recipe_of(tmp_path, run=run, methods=["uniform", "gradient-norm"])
    config = recipe.config(recipe.tasks[0], recipe.variants[0])
    fresh = bench.load(config, "test", 0)
    before = {k: v.clone() for k, v in fresh.loaded.model.state_dict().items()}
    gradients = {n: p.requires_grad for n, p in fresh.loaded.model.named_parameters()}
    warmed = bench.measurement(fresh, config, recipe_signals(recipe), 0)
    after = fresh.loaded.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert gradients == {n: p.requires_grad for n, p in fresh.loaded.model.named_parameters()}
    cold = bench.measurement(fresh, replace(config, head_steps=0), recipe_signals(recipe), 0)
    assert cold.spectrum is not None
    assert warmed.spectrum is not None
    name = cold.targets[0].name
    assert not torch.allclose(cold.spectrum.gram[name], warmed.spectrum.gram[name], rtol=1e-2)
    warm_head(fresh, config, ("classifier",), 0)
    changed = {
        k for k, v in fresh.loaded.model.state_dict().items() if not torch.equal(before[k], v)
    }
    assert changed
    assert all(key.startswith("classifier") for key in changed)


def recipe_signals(recipe: Recipe, which: int = 1) -> tuple[object, ...]:
    from gradrank.methods.registry import create

    return create(recipe.variants[which].method, {}).signals()
