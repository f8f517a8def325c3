import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cli.cli_cases import SHORT, TINY
from gradrank.core.errors import PlanError
from gradrank.core.plan import Plan
from gradrank.record import RunRecord


def parsed(result) -> dict:
    """Return the one object on stdout; anything else there is an error."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_plan_writes_all_it_says(planned) -> None:
    assert sorted(p.name for p in planned.iterdir()) == [
        "config.yaml",
        "measurement.safetensors",
        "plan.json",
        "record.json",
        "report.html",
    ]
    plan = Plan.load(planned / "plan.json")
    assert plan.parameters <= 1500
    record = RunRecord.load(planned / "record.json")
    assert (record.kind, record.status, record.plan) == ("plan", "finished", plan.to_dict())
    assert record.ranks_over_time == [[0, plan.ranks]]
    assert record.measurement is not None
    assert record.measurement["batches"] == 4
    assert record.cost["measure_seconds"] > 0
    assert record.cost["measure_peak_memory_bytes"] > 0


def test_allocating_again_equals_allocating_at_first(run, planned) -> None:
    source = planned / "measurement.safetensors"
    again = parsed(run("plan", "--from", source, "--budget", 1500, "--json"))
    assert again["plan"] == Plan.load(planned / "plan.json").to_dict()
    assert again["out"] is None
    other = parsed(run("plan", "--from", source, "--budget", 900, "--out", "b", "--json"))
    direct = parsed(
        run("plan", *TINY, "--batches", 4, "--budget", 900, "--quiet", "--out", "c", "--json")
    )
    assert other["plan"]["targets"] == direct["plan"]["targets"]
    assert other["plan"]["reliability"] == direct["plan"]["reliability"]


def test_another_method_can_be_tried_on_the_same_measurement(run, planned) -> None:
    source = planned / "measurement.safetensors"
    found = parsed(
        run("plan", "--from", source, "--method", "waterfill", "--budget", 900, "--json")
    )
    direct = parsed(
        run(
            "plan",
            *TINY,
            "--batches",
            4,
            "--method",
            "waterfill",
            "--budget",
            900,
            "--quiet",
            "--out",
            "c",
            "--json",
        )
    )
    assert found["plan"]["targets"] == direct["plan"]["targets"]
    assert found["plan"]["reliability"] == direct["plan"]["reliability"]


def test_from_takes_no_model(run, planned) -> None:
    result = run("plan", "--from", planned / "measurement.safetensors", *TINY)
    assert result.exit_code == 2
    assert "--batch-size, --max-length, --model, --task" in result.stderr


def test_a_trained_plan_keeps_its_ranks_and_records_itself(planned, trained) -> None:
    plan = Plan.load(planned / "plan.json")
    assert Plan.load(trained / "plan.json") == plan
    record = RunRecord.load(trained / "record.json")
    assert (record.kind, record.status) == ("train", "finished")
    assert len(record.losses["train"]) == 4
    assert record.trainable_parameters == {
        "peak": plan.parameters,
        "final": plan.parameters,
        "other": 0,
    }
    assert record.measurement is not None
    for key in ("train_seconds", "eval_seconds", "steps", "tokens", "peak_memory_bytes"):
        assert record.cost[key] > 0
    assert record.environment["versions"]["torch"]
    assert record.seeds == {"run": 0, "calibration": 0}
    assert not (trained / "checkpoints").exists()


def test_a_run_replays_from_the_configuration_it_wrote(run) -> None:
    first = run(
        "train",
        *TINY,
        *SHORT,
        "--batches",
        3,
        "--budget",
        "uniform:2",
        "--option",
        "energy=0.8",
        "--seed",
        3,
        "--calibration-seed",
        5,
        "--schedule",
        "constant",
        "--out",
        "a",
    )
    assert first.exit_code == 0, first.stderr
    again = run("train", "--config", "a/config.yaml", "--out", "b")
    assert again.exit_code == 0, again.stderr
    one, two = (RunRecord.load(f"{name}/record.json") for name in "ab")
    assert one.losses == two.losses
    assert one.config == two.config
    assert one.metrics == two.metrics
    assert Plan.load("a/plan.json").ranks == Plan.load("b/plan.json").ranks
    assert Path("a/config.yaml").read_text() == Path("b/config.yaml").read_text()
    first_weights = load_file("a/adapter/adapter_model.safetensors")
    second_weights = load_file("b/adapter/adapter_model.safetensors")
    assert all(torch.equal(second_weights[key], value) for key, value in first_weights.items())


def test_an_interrupted_run_resumes_to_the_same_end(run, monkeypatch) -> None:
    from gradrank.lab.trainer import Steps

    args = (*TINY, *SHORT, "--method", "uniform", "--budget", "uniform:1")
    assert run("train", *args, "--out", "whole").exit_code == 0
    on_step_end = Steps.on_step_end

    def stop_after_two(self: Steps, *rest: object, **named: object) -> None:
        if self.done == 1 and self.stopper is not None:
            self.stopper.asked = True
        on_step_end(self, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Steps, "on_step_end", stop_after_two)
        stopped = run("train", *args, "--out", "cut")
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    assert RunRecord.load("cut/record.json").status == "interrupted"
    changed = run("train", "--out", "cut", "--resume", "--lr", "0.5", "--budget", "uniform:2")
    assert changed.exit_code == 2
    assert "budget 'uniform:1' -> 'uniform:2', lr 0.01 -> 0.5" in changed.stderr
    resumed = run("train", "--out", "cut", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    one, two = (RunRecord.load(f"{name}/record.json") for name in ("whole", "cut"))
    assert two.status == "finished"
    assert two.losses == one.losses
    assert two.metrics == one.metrics
    done = run("train", "--out", "cut", "--resume", "--json")
    assert parsed(done)["metrics"] == two.metrics
    assert "nothing to resume" in done.stderr


def test_a_failed_export_does_not_lose_the_training(run, monkeypatch) -> None:
    def refuse(*_args: object, **_rest: object) -> None:
        raise PlanError("the peft export differs from the trained model.")

    monkeypatch.setattr("gradrank.cli.training.export", refuse)
    args = (*TINY, *SHORT, "--method", "uniform", "--budget", "uniform:1")
    failed = run("train", *args, "--out", "x")
    assert failed.exit_code == 1
    assert "differs from the trained model" in failed.stderr
    assert "'x/adapter-unchecked'" in failed.stderr
    assert not Path("x/adapter").exists()
    kept = load_file("x/adapter-unchecked/adapter_model.safetensors")
    assert any(value.any() for key, value in kept.items() if "lora_B" in key)


def test_nothing_to_resume_starts_anew_and_strangers_are_refused(run) -> None:
    args = (*TINY, *SHORT, "--method", "uniform", "--resume")
    started = run("train", *args, "--out", "new")
    assert started.exit_code == 0, started.stderr
    assert "starting a new one" in started.stderr
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine", encoding="utf-8")
    assert "no run that can be resumed" in run("train", *args, "--out", "other").stderr
    assert "choose one" in run("train", *args, "--overwrite", "--out", "new").stderr


def test_a_plan_and_a_method_are_one_too_many(run, planned) -> None:
    result = run("train", *TINY, "--plan", planned / "plan.json", "--method", "gard", "--out", "x")
    assert result.exit_code == 2
    assert "--plan decides what --method would" in result.stderr


def test_a_plan_of_another_model_is_refused_and_leaves_nothing(run, planned) -> None:
    result = run(
        "train",
        "--model",
        "tiny-gpt2",
        "--task",
        "tiny-lm",
        "--plan",
        planned / "plan.json",
        "--out",
        "x",
    )
    assert result.exit_code == 2
    assert "another model" in result.stderr
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("model", "task"), [("tiny-bert", "tiny-sentiment"), ("tiny-vit", "tiny-images")]
)
def test_classes_train_export_and_merge(run, model, task) -> None:
    found = parsed(
        run(
            "train",
            "--model",
            model,
            "--task",
            task,
            "--batches",
            2,
            "--batch-size",
            4,
            "--budget",
            "uniform:1",
            *SHORT,
            "--quiet",
            "--json",
            "--out",
            "run",
        )
    )
    assert 0 <= found["metrics"]["accuracy"] <= 1
    assert RunRecord.load("run/record.json").trainable_parameters["other"] > 0
    merged = parsed(run("export", "run", "--target", "merged", "--out", "m", "--json"))
    assert merged["difference"] <= merged["tolerance"]
    names = json.loads(Path("m/config.json").read_text(encoding="utf-8"))["id2label"].values()
    assert set(names) == set(Plan.load("run/plan.json").provenance["label_names"])


def test_own_data_of_all_forms(run) -> None:
    rows = [f"the river number {index} runs to the sea" for index in range(40)]
    Path("a.txt").write_text("\n".join(rows), encoding="utf-8")
    Path("a.csv").write_text("body\n" + "\n".join(rows), encoding="utf-8")
    Path("a.jsonl").write_text("\n".join(json.dumps({"text": r}) for r in rows), encoding="utf-8")
    plans = [
        parsed(
            run(
                "plan",
                "--model",
                "tiny-llama",
                "--data",
                name,
                "--head",
                "lm",
                "--batches",
                2,
                "--batch-size",
                2,
                "--max-length",
                16,
                *more,
                "--quiet",
                "--json",
                "--out",
                f"p-{name}",
            )
        )["plan"]["targets"]
        for name, more in (
            ("a.txt", ()),
            ("a.jsonl", ()),
            ("a.csv", ("--text-column", "body")),
        )
    ]
    assert plans[0] == plans[1] == plans[2]


def test_export_merges_what_was_trained(run, trained) -> None:
    told = run("export", trained, "--target", "merged", "--out", "m")
    assert told.exit_code == 0, told.stderr
    assert "logits differ by at most" in told.stdout
    model = AutoModelForCausalLM.from_pretrained("m")
    assert sum(p.numel() for p in model.parameters()) > 0
    peft = parsed(run("export", trained / "adapter", "--target", "peft", "--out", "a", "--json"))
    assert peft["difference"] == 0.0
    assert run("export", trained, "--out", "a").exit_code == 2
    assert run("export", trained, "--out", "a", "--overwrite").exit_code == 0
    Path("a/notes.txt").write_text("mine", encoding="utf-8")
    refused = run("export", trained, "--out", "a", "--overwrite")
    assert "'notes.txt'" in refused.stderr


def test_an_adapter_without_its_run_needs_the_base_model(run, trained) -> None:
    import shutil

    shutil.copytree(trained / "adapter", "lone")
    without = run("export", "lone", "--out", "a")
    assert without.exit_code == 2
    assert "--model" in without.stderr
    found = parsed(run("export", "lone", "--model", "tiny-llama", "--out", "a", "--json"))
    assert found["difference"] == 0.0


def test_report_of_several_runs(run, planned, trained, demonstrated) -> None:
    found = parsed(run("report", planned, trained / "record.json", "--out", "r.html", "--json"))
    assert found["records"] == 2
    assert "<html" in Path("r.html").read_text(encoding="utf-8")
    again = run("report", planned, "--out", "r.html")
    assert again.exit_code == 2
    assert "r.html" in again.stderr
    assert parsed(run("report", demonstrated[0], "--json"))["records"] == 3


def test_report_writes_figures_when_asked(run, planned) -> None:
    found = parsed(run("report", planned, "--out", "r.html", "--png", "--json"))
    pictures = list(Path("r-figures").glob("*.png"))
    assert pictures
    assert len(found["files"]) == 1 + 2 * len(pictures)
