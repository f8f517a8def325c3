import json
from pathlib import Path

from cli.cli_cases import SHORT, TINY, invoke
from gradrank.core.plan import Plan
from gradrank.record import RunRecord

METHODS = ("uniform", "gard", "waterfill")


def test_the_demo_trains_three_methods_at_one_budget_from_one_measurement(demonstrated) -> None:
    out, result = demonstrated
    told = json.loads(result.stdout)
    assert [run["method"] for run in told["runs"]] == list(METHODS)
    assert "proves nothing" in told["note"]
    assert (out / "report.html").is_file()
    records = [RunRecord.load(out / name / "record.json") for name in METHODS]
    budgets = {(record.plan or {})["budget"]["parameters"] for record in records}
    assert len(budgets) == 1
    assert all(r.trainable_parameters["final"] <= budgets.copy().pop() for r in records)
    assert records[0].measurement is None
    assert records[1].measurement is not None
    assert records[2].measurement is not None
    assert records[1].measurement["targets"] == records[2].measurement["targets"]
    assert result.stderr.count("measuring: 4/4") == 1


def test_a_run_of_the_demo_replays_with_train(demonstrated, tmp_path) -> None:
    out, _ = demonstrated
    again = invoke("train", "--config", out / "gard" / "config.yaml", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    one, two = (RunRecord.load(path / "record.json") for path in (out / "gard", tmp_path / "again"))
    assert one.losses == two.losses
    assert one.metrics == two.metrics
    first, second = (Plan.load(path / "plan.json") for path in (out / "gard", tmp_path / "again"))
    assert first.to_dict()["targets"] == second.to_dict()["targets"]
    assert first.reliability == second.reliability


def test_a_second_demo_replaces_the_first_but_nothing_else(run) -> None:
    args = ("demo", *TINY, "--batches", 2, *SHORT, "--methods", "uniform", "--quiet")
    assert run(*args).exit_code == 0
    second = run(*args, "--seed", 1)
    assert second.exit_code == 0, second.stderr
    assert RunRecord.load("gradrank-demo/uniform/record.json").seeds["run"] == 1
    assert "proves nothing" in second.stdout
    Path("gradrank-demo/uniform/notes.txt").write_text("mine", encoding="utf-8")
    third = run(*args)
    assert third.exit_code == 2
    assert "notes.txt" in third.stderr
    assert Path("gradrank-demo/uniform/notes.txt").is_file()


def test_a_demo_that_fails_leaves_the_earlier_one(run, monkeypatch) -> None:
    args = ("demo", *TINY, "--batches", 2, *SHORT, "--methods", "uniform", "--quiet")
    assert run(*args).exit_code == 0

    def interrupt(*_args: object, **_rest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradrank.cli.training.train", interrupt)
    stopped = run(*args, "--seed", 1)
    assert stopped.exit_code == 130
    assert "as it was before" in stopped.stderr
    assert RunRecord.load("gradrank-demo/uniform/record.json").seeds["run"] == 0
    assert [path.name for path in Path().iterdir()] == ["gradrank-demo"]


def test_unknown_methods_of_a_demo_are_refused_at_once(run) -> None:
    result = run("demo", *TINY, "--methods", "uniform,grad")
    assert result.exit_code == 2
    assert "Did you mean 'gard'?" in result.stderr
