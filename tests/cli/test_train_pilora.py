"""``gradrank train`` with methods that split neurons: both stages, record, resume, exports."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import gradrank as gr
from cli.cli_cases import TINY, invoke
from gradrank.core.partition import NeuronPartition
from gradrank.lab.models import resolve_model
from gradrank.record import RunRecord

STEPS, SPLIT = 8, 4
OPTIONS = {"rank": "2", "supplementary_rank": "1", "interval": "2", "initial_steps": str(SPLIT)}


def run_of(*more: str, budget: str = "uniform:2", steps: int = STEPS) -> tuple[str, ...]:
    options = OPTIONS | dict(option.split("=") for option in more)
    return (
        *TINY,
        *("--method", "pilora", "--budget", budget, "--steps", str(steps), "--lr", "1e-2"),
        *("--eval-batches", "2"),
        *(part for key, value in options.items() for part in ("--option", f"{key}={value}")),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with its checkpoints."""
    out = tmp_path_factory.mktemp("split") / "pilora"
    result = invoke("train", *run_of(), "--checkpoint-every", 1, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["method"] == "pilora"
    return out


def splits(record: RunRecord) -> dict[str, NeuronPartition]:
    assert record.neurons is not None
    targets = record.neurons["targets"]
    return {name: NeuronPartition.from_dict(entry) for name, entry in targets.items()}


def test_both_stages_are_recorded(trained: Path) -> None:
    record = RunRecord.load(trained / "record.json")
    plan = gr.Plan.load(trained / "plan.json")
    assert (record.status, record.kind) == ("finished", "train")
    (entry,) = record.decisions
    assert (entry["step"], entry["looks"], entry["left_out"]) == (SPLIT, SPLIT // 2, 0)
    sizes = record.trainable_parameters
    assert sizes["peak"] == plan.budget_parameters >= sizes["final"] == entry["parameters"]
    shapes = {planned.target.name: planned.target.d_in for planned in plan.targets}
    found = splits(record)
    assert sum(split.parameters(shapes[name]) for name, split in found.items()) == sizes["final"]
    assert list(found) == list(plan.ranks)
    assert any(split.is_split for split in found.values())
    assert record.ranks_over_time[-1] == [SPLIT, {n: s.lora_rank for n, s in found.items()}]
    assert record.neurons is not None
    assert record.neurons["maps"]
    assert len(record.losses["train"]) == STEPS


def test_the_report_draws_the_partitions(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    assert "dominant" in page
    assert "<svg" in page
    assert "://" not in page.replace("http://www.w3.org/", "")


def test_the_adapter_is_stock_and_gives_the_same_logits(trained: Path, tmp_path: Path) -> None:
    record = RunRecord.load(trained / "record.json")
    weights = load_file(trained / "adapter" / "adapter_model.safetensors")
    for name, split in splits(record).items():
        A, B = (weights[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
        assert A.shape[0] == B.shape[1] == split.lora_rank
        if split.is_split:
            dominant = torch.tensor(split.mask)
            assert not B[dominant, split.rank :].any()
            assert not B[~dominant, : split.rank].any()
            assert B[dominant, : split.rank].any()
    merged = tmp_path / "merged"
    result = invoke("export", trained, "--target", "merged", "--out", merged, "--json")
    assert result.exit_code == 0, result.stderr
    base = resolve_model("tiny-llama").model
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        plain = base.eval()(input_ids=ids).logits
        stock = PeftModel.from_pretrained(base, str(trained / "adapter")).eval()
        found = stock(input_ids=ids).logits
        whole = type(base).from_pretrained(merged).eval()(input_ids=ids).logits
    assert not torch.allclose(found, plain, atol=1e-3)
    torch.testing.assert_close(whole, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["vllm", "sglang", "llama.cpp"])
def test_rows_of_two_ranks_are_exported_for_engines(
    trained: Path, target: str, tmp_path: Path
) -> None:
    result = invoke("export", trained, "--target", target, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    done = json.loads(result.stdout)
    assert done["error"] < 1e-5
    assert done["effect"] > 100 * done["difference"]


@pytest.mark.parametrize("step", [2, SPLIT, 6])
def test_it_resumes_in_either_stage(trained: Path, step: int, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    for name in ("record.json", "report.html"):
        (again / name).unlink()
    shutil.rmtree(again / "adapter")
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(again / "checkpoints" / f"checkpoint-{later}", ignore_errors=True)
    result = invoke("train", "--out", again, "--resume")
    assert result.exit_code == 0, result.stderr
    same_run(trained, again)


def same_run(trained: Path, again: Path) -> None:
    first, second = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (trained, again)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    whole, found = (RunRecord.load(folder / "record.json") for folder in (trained, again))
    assert found.ranks_over_time == whole.ranks_over_time
    assert found.trainable_parameters == whole.trainable_parameters
    assert found.neurons == whole.neurons


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("rank=0",), "'rank' of method 'pilora'"),
        (("supplementary_rank=3",), "at least supplementary_rank and 1, 3 here"),
        (("interval=0",), "'interval' of method 'pilora'"),
        (("rule=majorty",), "one of majority, mean, top_fraction, cumulative, random"),
        (("threshold=1.5",), "'threshold' of method 'pilora'"),
        (("start=cold",), "'restart' or 'warm'"),
        ((f"initial_steps={STEPS}",), "would never reach its second stage"),
        ((f"interval={SPLIT + 1}",), "interval"),
        (("intervall=2",), "Did you mean 'interval'"),
    ],
)
def test_wrong_options_are_refused_with_one_message(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    refused(run_of(*options), message, tmp_path)


def test_a_budget_that_cannot_pay_the_supplementary_rank_is_refused(tmp_path: Path) -> None:
    refused(run_of(budget="100"), "supplementary_rank", tmp_path)


def refused(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = invoke("train", *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_rank_is_found_where_none_is_given(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--option", "interval=1", "--option", "initial_steps=3")
    arguments = (*TINY, "--method", "pilora", "--budget", "uniform:4", "--steps", 5)
    result = invoke("train", *arguments, "--eval-batches", 1, *options, "--out", out)
    assert result.exit_code == 0, result.stderr
    record = RunRecord.load(out / "record.json")
    sizes = record.trainable_parameters
    assert record.plan is not None
    assert sizes["final"] <= record.plan["budget"]["parameters"]
    assert dict(record.ranks_over_time)[0].keys() == record.plan["targets"].keys()


def test_hybrid_trains_a_plan_with_partitions(tmp_path: Path) -> None:
    out = tmp_path / "run"
    made = ("--method", "hybrid", "--budget", "uniform:2", "--batches", 4, "--steps", 3)
    result = invoke("train", *TINY, *made, "--eval-batches", 1, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    plan = gr.Plan.load(out / "plan.json")
    assert plan.partitions, "the test shows nothing of partitions"
    record = RunRecord.load(out / "record.json")
    assert record.status == "finished"
    assert record.trainable_parameters["final"] == plan.parameters <= plan.budget_parameters
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    for name, split in plan.partitions.items():
        B = weights[f"base_model.model.{name}.lora_B.weight"]
        assert B.shape[1] == split.lora_rank
        dominant = torch.tensor(split.mask)
        assert not B[dominant, split.rank :].any()
        assert not B[~dominant, : split.rank].any()
    loaded = PeftModel.from_pretrained(resolve_model("tiny-llama").model, str(out / "adapter"))
    assert torch.isfinite(loaded(input_ids=torch.arange(4, 20)[None]).logits).all()
