import errno
import json
from pathlib import Path

import pytest

from cli.cli_cases import SHORT, TINY, invoke
from gradrank.cli.demo_folder import MARKER, check_demo_folder, mark
from gradrank.cli.folders import check_out, run_folder, told_when_interrupted
from gradrank.core.errors import OutputError


def fill(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return path


def names(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


def test_overwrite_replaces_a_run_but_nothing_else(tmp_path) -> None:
    run = fill(tmp_path / "run", plan_json="{}", record_json="{}")
    check_out(run, overwrite=True)
    with pytest.raises(OutputError, match="not empty"):
        check_out(run, overwrite=False)
    (run / "thesis.tex").write_text("years", encoding="utf-8")
    with pytest.raises(OutputError, match=r"'thesis\.tex'.*not replaced"):
        check_out(run, overwrite=True)


def test_a_run_that_leaves_a_record_replaces_the_old_one(tmp_path) -> None:
    out = fill(tmp_path / "run", plan_json="old", record_json="old")
    with run_folder(out, overwrite=True) as folder:
        assert names(folder) == []
        (folder / "record.json").write_text("new", encoding="utf-8")
    assert names(out) == ["record.json"]
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OutputError("disk full"), ValueError])
def test_a_run_that_leaves_nothing_gives_the_old_one_back(tmp_path, error) -> None:
    out = fill(tmp_path / "run", record_json="old")

    def fail() -> None:
        with run_folder(out, overwrite=True) as folder:
            (folder / "plan.json").write_text("half", encoding="utf-8")
            raise error

    with pytest.raises((KeyboardInterrupt, OutputError, ValueError)):
        fail()
    assert (out / "record.json").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["run"]


def test_a_new_run_that_fails_leaves_no_folder(tmp_path) -> None:
    with pytest.raises(ValueError, match="x"), run_folder(tmp_path / "run", False):
        raise ValueError("x")
    assert names(tmp_path) == []


def test_an_interrupted_run_with_a_checkpoint_is_kept(tmp_path) -> None:
    def interrupted() -> None:
        with run_folder(tmp_path / "run", False) as folder:
            (folder / "config.yaml").write_text("", encoding="utf-8")
            (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path / "run") == ["checkpoints", "config.yaml"]


def test_an_interruption_says_what_it_left(tmp_path) -> None:
    for path, words in ((tmp_path / "new", "was not written"), (tmp_path, "as it was before")):
        with pytest.raises(KeyboardInterrupt, match=words), told_when_interrupted(path):
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt, match=r"^told$"), told_when_interrupted(tmp_path):
        raise KeyboardInterrupt("told")


def test_a_demo_folder_is_replaced_only_if_all_of_it_is_the_demos(tmp_path) -> None:
    demo = fill(tmp_path / "demo", report_html="page")
    with pytest.raises(OutputError, match="no demo made it"):
        check_demo_folder(demo)
    mark(demo)
    check_demo_folder(demo)
    (demo / "gard").mkdir()
    (demo / "gard" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"gard/notes\.txt"):
        check_demo_folder(demo)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "x", "files": ["a"]}', "null"])
def test_a_marker_that_is_none_protects_the_folder(tmp_path, text) -> None:
    demo = fill(tmp_path / "demo", a="x")
    (demo / MARKER).write_text(text, encoding="utf-8")
    with pytest.raises(OutputError, match="no demo made it"):
        check_demo_folder(demo)


def full(*_args: object, **_rest: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, verb) -> None:
    monkeypatch.setattr("os.fsync", full)
    more = SHORT if verb == "train" else ()
    result = invoke(verb, *TINY, "--batches", 2, *more, "--quiet", "--out", tmp_path / "x")
    assert result.exit_code == 1
    assert "no space left" in result.stderr
    assert "Traceback" not in result.stderr
    assert names(tmp_path) == []


def test_a_full_disk_while_replacing_keeps_the_old_plan(tmp_path, planned, monkeypatch) -> None:
    args = ("plan", "--from", planned / "measurement.safetensors", "--out", tmp_path / "x")
    assert invoke(*args, "--budget", 500).exit_code == 0
    monkeypatch.setattr("os.fsync", full)
    result = invoke(*args, "--budget", 900, "--overwrite")
    assert result.exit_code == 1
    assert "no space left" in result.stderr
    plan = json.loads((tmp_path / "x" / "plan.json").read_text(encoding="utf-8"))
    assert plan["budget"]["parameters"] == 500
    assert names(tmp_path) == ["x"]


def test_interrupted_measuring_leaves_nothing(tmp_path, monkeypatch) -> None:
    def interrupt(*_args: object, **_rest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradrank.cli.planning.measure", interrupt)
    result = invoke("plan", *TINY, "--quiet", "--out", tmp_path / "x")
    assert result.exit_code == 130
    assert "was not written" in result.stderr
    assert names(tmp_path) == []
