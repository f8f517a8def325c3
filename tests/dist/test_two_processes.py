"""Two gloo processes with N batches each equal one process with 2 N; errors reach both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gradrank as gr
from cases import CASES, batches
from gradrank.signals.measurement import Measurement
from launching import run_ranks

pytestmark = pytest.mark.dist

CASE = CASES["llama"]
DATA = batches(CASE, 8)
SIGNALS = [gr.Spectrum(sketch_dim=8), gr.MeanGradient(8)]
TIMEOUT = 120


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found, per check: ``{"value": ...}`` or ``{"error": ...}``."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(Path(__file__).with_name("worker.py"), str(folder), seconds=TIMEOUT)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def values(reports: list[dict[str, Any]], check: str) -> list[Any]:
    for report in reports:
        assert "value" in report[check], report[check].get("trace")
    return [report[check]["value"] for report in reports]


def errors(reports: list[dict[str, Any]], check: str) -> list[str]:
    for rank, report in enumerate(reports):
        assert "error" in report[check], f"[rank {rank}] did not raise"
    return [report[check]["error"] for report in reports]


def assert_measured(found: dict[str, Any], wanted: Measurement) -> None:
    for target in wanted.targets:
        gram = torch.tensor(found["gram"][target.name], dtype=torch.float64)
        torch.testing.assert_close(gram, wanted.gram(target.name), rtol=1e-5, atol=1e-12)
        mean = torch.tensor(found["mean"][target.name], dtype=torch.float64)
        expected = wanted.need_mean_gradient().values["whole"][target.name]
        torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-7)
    for key in ("examples", "tokens", "model", "signals", "seed", "base_parameters"):
        assert found["info"][key] == wanted.info[key], key
    assert found["info"]["processes"] == 2
    assert wanted.info["processes"] == 1


@pytest.mark.parametrize("method", ["gard", "waterfill", "hybrid"])
def test_the_plan_of_two_is_the_plan_of_one(reports: list[dict[str, Any]], method: str) -> None:
    first, second = values(reports, f"plan_{method}")
    for plan in (first, second):
        plan["provenance"].pop("seconds")
    assert first == second
    one = gr.plan(CASE.model(), DATA, method, "uniform:3", num_batches=8)
    found = gr.Plan.from_dict(first)
    assert found.ranks == one.ranks
    assert found.partitions == one.partitions
    assert found.scores == pytest.approx(one.scores, rel=1e-4)
    assert found.provenance["batches"] == 8


def test_the_statistics_of_two_are_those_of_one(reports: list[dict[str, Any]]) -> None:
    one = gr.measure(CASE.model(), DATA, SIGNALS, num_batches=8)
    for found in values(reports, "even"):
        assert_measured(found, one)
        assert found["counts"]["whole"] == 8


def test_the_row_factors_of_two_are_those_of_one(reports: list[dict[str, Any]]) -> None:
    one = gr.measure(CASE.model(), DATA, gr.MeanGradient(8, rows=True), num_batches=8)
    kept = one.need_mean_gradient().rows["whole"]
    first, second = values(reports, "rows")
    assert first == second
    # Which batches count as even depends on how they were dealt out; the whole does not.
    assert set(first) == {"whole", "even", "odd"}
    assert set(first["whole"]) == set(kept)
    for name, factors in kept.items():
        wanted, gram = factors @ factors.T, torch.tensor(first["whole"][name])
        torch.testing.assert_close(gram, wanted, rtol=1e-3, atol=float(wanted.max()) / 1e3)


def test_uneven_numbers_of_batches(reports: list[dict[str, Any]]) -> None:
    one = gr.measure(CASE.model(), DATA[:5], SIGNALS, num_batches=5)
    for found in values(reports, "uneven"):
        assert_measured(found, one)
        assert found["counts"]["whole"] == 5


def test_a_model_in_distributed_data_parallel(reports: list[dict[str, Any]]) -> None:
    one = gr.measure(CASE.model(), DATA[:5], SIGNALS, num_batches=5)
    first, second = values(reports, "wrapped")
    assert_measured(first, one)
    assert first["weight"] == second["weight"]
    assert first["weight"] != CASE.model().lm_head.weight.tolist()


def test_dense_gradients_do_not_travel(reports: list[dict[str, Any]]) -> None:
    for message in errors(reports, "dense"):
        assert "estimator='dense' works in one process only" in message


@pytest.mark.parametrize(
    ("check", "cause"),
    [
        ("no_data", "the data gave 0 batches"),
        ("broken_data", "the disk is gone"),
        ("nan_loss", "loss of batch 1 is nan"),
    ],
)
def test_an_error_in_one_process_is_raised_in_both(
    reports: list[dict[str, Any]], check: str, cause: str
) -> None:
    innocent, guilty = errors(reports, check)
    assert cause in guilty
    assert "1 other process(es) could not measure" in innocent


def test_measuring_goes_on_after_errors(reports: list[dict[str, Any]]) -> None:
    assert values(reports, "after_errors") == values(reports, "even")
