"""``gradrank train`` with methods that prune: files, record, resume after SIGKILL, exports."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gradrank as gr
from cli.cli_cases import TINY, invoke
from gradrank.record import RunRecord
from launching import COMMAND, start

SCHEDULE = ("interval=2", "warmup=1", "final=3")
OPTIONS = {
    "igu": ("score_every=1", "segments=4"),
    "igu-direction": ("score_every=1", "segments=2", "tolerance=1e6"),
    "adalora": (),
}
DUE = [3, 5, 7]
STEPS = 10


def run_of(method: str, *more: str) -> tuple[str, ...]:
    options = dict(option.split("=") for option in (*SCHEDULE, *OPTIONS[method], *more))
    return (
        *TINY,
        *("--method", method, "--budget", "uniform:2", "--steps", str(STEPS), "--lr", "1e-2"),
        *("--eval-batches", "2"),
        *(part for key, value in options.items() for part in ("--option", f"{key}={value}")),
    )


@pytest.fixture(scope="module", params=list(OPTIONS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; its name is the method's."""
    out = tmp_path_factory.mktemp("pruned") / request.param
    result = invoke("train", *run_of(request.param), "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["method"] == request.param
    (out.parent / "answer.json").write_text(json.dumps(answer))
    return out


def test_a_run_begins_above_its_budget_and_ends_within(trained: Path) -> None:
    record = RunRecord.load(trained / "record.json")
    plan = gr.Plan.load(trained / "plan.json")
    assert record.status == "finished"
    assert [decision["step"] for decision in record.decisions] == DUE
    spent = [decision["parameters"] for decision in record.decisions]
    sizes = record.trainable_parameters
    assert sizes["peak"] == 2 * plan.budget_parameters > spent[0] > spent[1] >= spent[2]
    assert sizes["final"] == spent[2] <= plan.budget_parameters
    assert json.loads((trained.parent / "answer.json").read_text())["parameters"] == sizes["final"]
    assert all(decision["parameters"] <= decision["budget"] for decision in record.decisions)
    assert all(decision["importance"] for decision in record.decisions)
    assert ("gap" in record.decisions[0]) == (trained.name == "igu-direction")
    assert record.decisions[-1]["passes"] > 0 or trained.name == "adalora"
    assert dict(record.ranks_over_time)[0] == dict.fromkeys(plan.ranks, 4)


def test_its_adapter_is_stock_and_has_the_recorded_ranks(trained: Path) -> None:
    record = RunRecord.load(trained / "record.json")
    weights = load_file(trained / "adapter" / "adapter_model.safetensors")
    ranks = record.ranks_over_time[-1][1]
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    found = {
        key.removeprefix(prefix).removesuffix(suffix): tensor.shape[0]
        for key, tensor in weights.items()
        if key.endswith(suffix)
    }
    assert found == {name: rank for name, rank in ranks.items() if rank}
    assert (
        sum(tensor.numel() for tensor in weights.values()) == record.trainable_parameters["final"]
    )
    names = sorted(path.name for path in trained.iterdir())
    assert names == ["adapter", "config.yaml", "plan.json", "record.json", "report.html"]
    page = (trained / "report.html").read_text()
    assert trained.name in page
    assert "://" not in page.replace("http://www.w3.org/", "")


@pytest.mark.parametrize("trained", ["igu"], indirect=True)
@pytest.mark.parametrize("target", ["peft", "vllm", "sglang", "llama.cpp", "merged"])
def test_it_exports(trained: Path, target: str, tmp_path: Path) -> None:
    out = tmp_path / target
    result = invoke("export", trained, "--target", target, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["target"] == target
    assert list(out.glob("*.safetensors"))


def test_show_lists_its_ranks(trained: Path) -> None:
    result = invoke("show", trained / "adapter")
    assert result.exit_code == 0, result.stderr
    final = RunRecord.load(trained / "record.json").trainable_parameters["final"]
    assert f"{final:,}" in result.stdout


@pytest.mark.parametrize("trained", ["igu"], indirect=True)
def test_a_run_that_is_killed_resumes_to_the_same_adapter(trained: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    options = map(str, (*run_of(trained.name), "--checkpoint-every", "1", "--out", killed))
    process = start(COMMAND, "train", *options)
    reached = killed / "checkpoints" / "checkpoint-4" / "complete.json"
    while not reached.exists() and process.code is None:
        time.sleep(0.01)
    process.kill()
    assert process.code == -signal.SIGKILL, process.stderr
    assert not (killed / "record.json").exists()
    result = invoke("train", "--out", killed, "--resume")
    assert result.exit_code == 0, result.stderr
    first, second = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (trained, killed)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    whole, again = (RunRecord.load(folder / "record.json") for folder in (trained, killed))
    assert again.ranks_over_time == whole.ranks_over_time
    assert again.trainable_parameters == whole.trainable_parameters
    assert [d["importance"] for d in again.decisions] == [d["importance"] for d in whole.decisions]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("igu", ("estimator=gird",), "estimator"),
        ("igu", ("segmets=4",), "Did you mean 'segments'"),
        ("igu", ("score_every=0",), "score_every"),
        ("igu", ("segments=1",), "2 or more where an interior point is drawn"),
        ("igu", ("initial_rank=2",), "there is nothing to take away"),
        ("igu", ("score_every=9",), "without having looked at anything"),
        ("igu-direction", ("estimator=stochastic",), "'grid' or 'unbiased'"),
        ("adalora", ("beta1=1",), "beta1"),
        ("adalora", ("final=10",), "would never take any capacity away: of 10 steps"),
        ("adalora", ("after=stop",), "'continue' or 'restart'"),
        ("adalora", ("score_every=2",), "score_every"),
    ],
)
def test_wrong_options_are_refused_with_one_message(
    method: str, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = invoke("train", *run_of(method, *options), "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_restarting_what_is_left_is_an_option(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke("train", *run_of("adalora", "after=restart"), "--out", out)
    assert result.exit_code == 0, result.stderr
    record = RunRecord.load(out / "record.json")
    assert [decision["step"] for decision in record.decisions] == DUE


def test_a_plan_is_that_of_uniform_ranks(tmp_path: Path) -> None:
    out = tmp_path / "plan"
    result = invoke("plan", *TINY, "--method", "igu", "--budget", "uniform:2", "--out", out)
    assert result.exit_code == 0, result.stderr
    plan = gr.Plan.load(out / "plan.json")
    assert plan.method == "igu"
    assert set(plan.ranks.values()) == {2}
    assert RunRecord.load(out / "record.json").kind == "plan"


def test_the_methods_are_listed_with_their_options() -> None:
    result = invoke("methods", "--json")
    assert result.exit_code == 0, result.stderr
    listed = {entry["name"]: entry for entry in json.loads(result.stdout)["methods"]}
    assert set(OPTIONS) <= set(listed)
    options = {entry["name"] for entry in listed["igu"]["options"]}
    assert {"estimator", "segments", "score_every", "beta1", "beta2", "combine"} <= options
    assert {"initial_rank", "interval", "warmup", "final", "after"} <= options
    assert "IGU-LoRA" in listed["igu"]["source"]
    assert "2303.10512" in listed["adalora"]["source"]
