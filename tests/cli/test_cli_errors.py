import errno
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cli.cli_cases import SHORT, TINY
from gradrank.cli.main import explain, main
from gradrank.core.errors import OptionError, OutputError


def refused(result, *words: str) -> None:
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("trian",), ("verb 'trian'", "Did you mean 'train'?")),
        (("train", "--stepz", "3"), ("--stepz", "--steps")),
        (("plan", *TINY), ("--out DIR",)),
        (("plan", "--task", "tiny-lm", "--out", "x"), ("--model",)),
        (("plan", "--model", "tiny-llama", "--out", "x"), ("--task or --data", "neither")),
        (("plan", *TINY, "--data", "a.txt", "--out", "x"), ("--task or --data", "both")),
        (("plan", "--model", "m", "--data", "a.txt", "--out", "x"), ("--head", "missing")),
        (("plan", *TINY, "--method", "unifrom", "--out", "x"), ("Did you mean 'uniform'?",)),
        (("plan", *TINY, "--budget", "8x", "--out", "x"), ("budget '8x'", "uniform:8")),
        (("plan", *TINY, "--option", "energy", "--out", "x"), ("'energy'", "KEY=VALUE")),
        (("plan", *TINY, "--steps", "3", "--out", "x"), ("--steps",)),
        (("plan", *TINY, "--batches", "0", "--out", "x"), ("--batches",)),
        (("plan", "--from", "absent.safetensors"), ("absent.safetensors", "does not exist")),
        (("train", *TINY, "--lr", "0", "--out", "x"), ("--lr",)),
        (("show", "absent"), ("'absent' does not exist",)),
        (("report",), ("PATH",)),
        (("report", "absent"), ("'absent' does not exist",)),
        (("export", "absent", "--out", "x"), ("'absent' does not exist",)),
        (("export", "absent"), ("--out DIR",)),
        (("methods", "gerd"), ("Did you mean 'gard'?",)),
    ],
)
def test_mistakes_are_named_with_what_to_do(run, args, words) -> None:
    refused(run(*args), *words)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--option", "enrgy=0.5"), ("no option 'enrgy'", "Did you mean 'energy'?")),
        (("--option", "energy=much"), ("'energy'", "'much'", "float")),
        (("--budget", "10"), ("budget 10", "floor", "at least")),
        (("--budget", "uniform:9", "--option", "r_max=2"), ("above the ceiling", "r_max")),
        (("--targets", "q_prj"), ("'q_prj'", "Did you mean 'q_proj'?")),
        (("--device", "gpu"), ("device 'gpu'", "cuda")),
        (("--max-length", "9999"), ("9999", "128")),
        (("--task", "tiny-ml"), ("tiny-ml", "Did you mean 'tiny-lm'?")),
        (("--model", "tiny-lama"), ("tiny-lama", "Did you mean 'tiny-llama'?")),
        (("--head", "classification"), ("'tiny-lm' has the head 'lm'",)),
    ],
)
def test_mistakes_that_need_the_model_are_named_too(run, args, words) -> None:
    refused_late = run("plan", *TINY, "--quiet", *args, "--out", "x")
    refused(refused_late, *words)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("name", "text", "args", "words"),
    [
        ("a.jsonl", '{"txt": "hello"}\n' * 9, ("--head", "lm"), ("text", "txt")),
        ("a.csv", "text,label\n", ("--head", "lm"), ("empty",)),
        ("a.txt", "", ("--head", "lm"), ("empty",)),
        (
            "a.csv",
            "text\nhi\n",
            ("--head", "lm", "--text-column", "tex"),
            ("Did you mean 'text'?",),
        ),
        ("a.csv", "text\nhi\nho\n", ("--head", "classification"), ("label", "--label-column")),
    ],
)
def test_data_that_cannot_be_used(run, name, text, args, words) -> None:
    Path(name).write_text(text, encoding="utf-8")
    result = run("plan", "--model", "tiny-llama", "--data", name, *args, "--quiet", "--out", "x")
    refused(result, *words)


def test_a_mistyped_file_is_told_with_the_nearest(run) -> None:
    Path("train.jsonl").write_text("{}\n", encoding="utf-8")
    result = run("plan", "--model", "m", "--data", "trian.jsonl", "--head", "lm", "--out", "x")
    refused(result, "'trian.jsonl' does not exist", "Did you mean 'train.jsonl'?")


def test_an_existing_folder_is_left_alone(run) -> None:
    Path("kept").mkdir()
    Path("kept/notes.txt").write_text("mine", encoding="utf-8")
    for verb in ("plan", "train"):
        refused(run(verb, *TINY, "--out", "kept"), "'kept'", "not empty")
        refused(run(verb, *TINY, "--out", "kept", "--overwrite"), "'notes.txt'", "not replaced")
    refused(run("demo", *TINY, "--out", "kept"), "'kept'", "no demo made it")
    refused(run("plan", *TINY, "--out", "kept/notes.txt"), "is a file")
    assert [path.name for path in Path("kept").iterdir()] == ["notes.txt"]
    assert Path("kept/notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OptionError("a is wrong. Do b."), 2, "error: a is wrong. Do b.\n"),
        (OSError(errno.ENOSPC, "No space left", "big.bin"), 1, "no space left"),
        (ValueError("deep\ninside"), 1, "error: ValueError: deep inside\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (click.UsageError("bad flag"), 2, "error: bad flag\n"),
        (OutputError("'x' exists already."), 2, "'x' exists"),
    ],
)
def test_every_error_becomes_one_message_and_a_status(capsys, error, status, words) -> None:
    assert explain(error, debug=False) == status
    told = capsys.readouterr()
    assert told.out == ""
    assert words in told.err
    assert "Traceback" not in told.err


def test_a_full_disk_is_a_failure_not_refused_input(capsys) -> None:
    error = OutputError("no space left while writing 'x'.")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert explain(error, debug=False) == 1
    assert capsys.readouterr().err == "error: no space left while writing 'x'.\n"


def test_tracebacks_come_only_when_asked_for(monkeypatch) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("gradrank.cli.methods.describe", broken)
    plain = CliRunner().invoke(main, ["methods"])
    assert plain.exit_code == 1
    assert "Traceback" not in plain.stderr
    assert "--debug" in plain.stderr
    for args, env in ((["methods", "--debug"], {}), (["methods"], {"GRADRANK_DEBUG": "1"})):
        loud = CliRunner(env=env).invoke(main, args)
        assert loud.exit_code == 1
        assert "Traceback" in loud.stderr
        assert "a defect" in loud.stderr


def test_diverging_training_says_what_to_do_and_keeps_the_record(run, monkeypatch) -> None:
    import torch

    from gradrank.lab.trainer import Steps

    add = Steps.add

    def explode(self: Steps, loss: torch.Tensor, tokens: int, positions: int) -> None:
        add(self, loss * (float("nan") if self.done == 2 else 1.0), tokens, positions)

    monkeypatch.setattr(Steps, "add", explode)
    result = run("train", *TINY, *SHORT, "--method", "uniform", "--out", "x")
    assert result.exit_code == 1
    assert "the loss is nan at step 3" in result.stderr
    assert "learning rate" in result.stderr
    assert '"status": "failed"' in Path("x/record.json").read_text(encoding="utf-8")
    assert not Path("x/adapter").exists()
