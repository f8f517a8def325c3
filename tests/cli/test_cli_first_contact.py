"""First contact: every error is met on purpose and reads well; shells complete names."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from torch import nn

import gradrank as gr
from cases import hand_plan, tiny_llama
from cli.cli_cases import SHORT, TINY
from gradrank.cli import completion
from gradrank.cli.main import EXTRAS, explain, main
from gradrank.lab.locate import known_models
from gradrank.lab.tasks import TASKS
from gradrank.presets import presets

PLAN = {
    "schema": "gradrank.plan/1",
    "method": {"name": "gard", "options": {}},
    "budget": {"kind": "parameters", "value": 40, "parameters": 40},
    "targets": {"model.layers.0.nope": {"rank": 1, "d_in": 8, "d_out": 8}},
}


def changed(**parts: object) -> str:
    return json.dumps({**PLAN, **parts})


FILES = {
    "text.txt": "hello\n" * 40,
    "bad.json": "{nope",
    "list.json": "[1]",
    "other.json": changed(schema="gradrank.plan/9"),
    "negative.json": changed(targets={"a.q": {"rank": -3, "d_in": 8, "d_out": 8}}),
    "over.json": changed(budget={"kind": "parameters", "value": 3, "parameters": 3}),
    "lacking.json": json.dumps({key: PLAN[key] for key in PLAN if key != "budget"}),
    "alien.json": changed(),
    "bad.yaml": "a: [1\n",
    "odd.yaml": "- 1\n",
    "recipe.yaml": "name: x\nmethodz: [gard]\n",
    "bad.jsonl": '{"text": "a"}\n{oops\n',
    "junk.safetensors": "junk",
    "cut/adapter_config.json": '{"peft_type": "LORA", "r": 4, "lora_alpha": 8}',
    "cut/adapter_model.safetensors": "cut",
    "ia3/adapter_config.json": '{"peft_type": "IA3"}',
    "bare/config.json": '{"model_type": "llama"}',
    "odd/config.json": '{"model_type": "llma"}',
    "odd/model.safetensors": "x",
    "pickled/config.json": '{"model_type": "llama"}',
    "pickled/pytorch_model.bin": "x",
    "broken/record.json": '{"schema": "gradrank.record/1", "name": "a"}',
    "empty/.keep": "",
}
P, T, MODEL = ("plan", *TINY), ("train", *TINY), ("plan", "--task", "tiny-lm", "--model")
DATA = ("plan", "--model", "tiny-llama", "--data")

INPUTS = [
    # Flags and their values.
    (("--debugg",), ("--debugg", "--debug")),
    ((*P, "extra"), ("unexpected", "extra")),
    ((*P, "--out"), ("--out", "requires an argument")),
    ((*P, "--seed", "one"), ("--seed", "'one' is not a whole number")),
    ((*P, "--seed", "-1"), ("--seed", "-1 is not in the range")),
    ((*T, "--lr", "fast"), ("--lr", "'fast' is not a number")),
    ((*T, "--lora-dropout", "2"), ("--lora-dropout", "range")),
    ((*P, "--dtype", "float8"), ("'float8' is unknown", "bfloat16")),
    ((*P, "--head", "lmm"), ("'lmm' is unknown", "Did you mean 'lm'?")),
    ((*T, "--schedule", "cosin"), ("Did you mean 'cosine'?",)),
    (("export", "cut", "--target", "vlm"), ("Did you mean 'vllm'?",)),
    (("completion", "tcsh"), ("'tcsh' is unknown", "bash, fish, zsh")),
    (("completion",), ("Missing argument 'SHELL'", "bash, zsh, fish")),
    (("compare",), ("Missing argument 'RECIPE'",)),
    (("compare", "recipe.yaml", "--workers", "0"), ("--workers", "range")),
    # Budgets.
    ((*P, "--budget", "-5"), ("budget '-5'", "uniform:8")),
    ((*P, "--budget", "0"), ("0", "positive", "uniform:8")),
    ((*P, "--budget", "uniform:0"), ("'uniform:0'", "at least 1")),
    ((*P, "--budget", "200%"), ("outside (0, 1]", "'0.5%'")),
    ((*P, "--budget", "unifrom:4"), ("'unifrom:4'", "'uniform:8'")),
    # Methods, presets, options.
    ((*P, "--method", "dora"), ("method 'dora' is unknown", "gard")),
    ((*P, "--preset", "pilora"), ("preset 'pilora' is unknown", "pilora-glue-cola")),
    ((*P, "--option", "energy=1", "--option", "energy=2"), ("'energy'", "twice")),
    ((*T, "--epochs", "1", "--steps", "2"), ("twice", "Leave one")),
    (("demo", "--methods", "gerd"), ("Did you mean 'gard'?",)),
    (("methods", "--presets", "gerd"), ("Did you mean 'gard'?",)),
    # Where results go.
    ((*P, "--out", "text.txt/run"), ("'text.txt/run' cannot be made", "is a file")),
    ((*P, "--out", "broken"), ("'broken'", "not empty", "--overwrite")),
    # Files of settings.
    ((*P, "--config", "absent.yaml"), ("'absent.yaml' does not exist",)),
    ((*P, "--config", "bad.yaml"), ("'bad.yaml' is not valid YAML",)),
    ((*P, "--config", "odd.yaml"), ("'odd.yaml'", "map keys to values")),
    (("compare", "absent.yaml", "--out", "x"), ("'absent.yaml' does not exist",)),
    (("compare", "bad.yaml", "--out", "x"), ("'bad.yaml' is not valid YAML",)),
    (("compare", "recipe.yaml", "--out", "x"), ("'methodz'", "Did you mean 'methods'?")),
    # Plans, measurements, records.
    ((*T, "--plan", "absent.json"), ("plan 'absent.json' does not exist",)),
    ((*T, "--plan", "bad.json"), ("'bad.json' is not valid JSON",)),
    ((*T, "--plan", "list.json"), ("'list.json'", "no plan", "gradrank plan")),
    ((*T, "--plan", "other.json"), ("'other.json'", "'gradrank.plan/9'")),
    ((*T, "--plan", "negative.json"), ("'negative.json'", "'a.q' has rank -3")),
    ((*T, "--plan", "over.json"), ("'over.json'", "budget of 3", "Lower some ranks")),
    ((*T, "--plan", "lacking.json"), ("'lacking.json'", "field 'budget' is missing")),
    (("plan", "--from", "junk.safetensors"), ("'junk.safetensors' is damaged",)),
    (("plan", "--from", "empty"), ("'empty' is a folder", "measurement.safetensors")),
    (("report", "broken"), ("record.json", "lacks its name or its kind")),
    (("report", "list.json"), ("'list.json' is no record", "gradrank.record/1")),
    (("show", "empty"), ("'empty' holds neither",)),
    (("show", "text.txt"), ("'text.txt' is not valid JSON",)),
    # Adapters.
    (("show", "cut"), ("adapter_model.safetensors' is damaged", "cut off")),
    (("show", "ia3"), ("'IA3'", "LORA or ADALORA")),
    (("export", "cut", "--out", "x"), ("is damaged",)),
    (("export", "empty", "--out", "x"), ("'empty' holds no adapter", "finished run")),
    (("export", "cut", "cut", "--weight", "1", "--out", "x"), ("(2)", "(1)", "one --weight")),
    (("export", "cut", "--budget", "9", "--rank", "2", "--out", "x"), ("Give one of them",)),
]
LATE = [
    # What needs the libraries to be known; the model itself is never built.
    ((*MODEL, "text.txt"), ("'text.txt' is a file", "config.json")),
    ((*MODEL, "empty"), ("'empty' holds no model", "config.json is missing")),
    ((*MODEL, "bare"), ("'bare' holds no weights", "save_pretrained")),
    ((*MODEL, "odd"), ("'odd' could not be loaded", "llma", "upgrade transformers")),
    ((*MODEL, "pickled"), ("pickle files", "can run code")),
    ((*MODEL, "cut"), ("'cut' holds no model", "folder of its base model")),
    ((*DATA, "bad.jsonl", "--head", "lm"), ("'bad.jsonl' line 2",)),
    ((*DATA, "empty", "--head", "lm"), ("'empty' is a folder", "Give a file")),
    ((*P, "--device", "cdua"), ("'cdua'", "cuda")),
    ((*P, "--dtype", "float16", "--device", "cpu"), ("'float16'", "'float32'")),
    ((*P, "--option", "energy=2"), ("'energy'", "(0, 1]")),
    ((*P, "--targets", "re:("), ("'re:('", "regular expression")),
    ((*T, *SHORT, "--plan", "alien.json"), ("model.layers.0.nope",)),
]


@pytest.fixture
def mess(run, tmp_path: Path) -> Callable[..., object]:
    """Return what runs a verb, in a folder with files that are all wrong."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return run


def reads_well(message: str) -> None:
    """Assert what every message of an error has in common."""
    assert 15 < len(message) < 900, message
    first, *reasons = message.splitlines()
    assert all(reason.startswith("- ") for reason in reasons), message
    assert first[-1] in (":" if reasons else ".?!"), message
    assert not re.search(r"Traceback|object at 0x|<class |Error\(|\bNoneType\b", message), message
    assert re.search(r"['\d]|--\w", message), f"names no value: {message}"


@pytest.mark.parametrize(("args", "words"), [*INPUTS, *LATE])
def test_bad_input_is_refused_with_one_clear_message(mess, args, words) -> None:
    given = args if "--out" in args or args[0] not in {"plan", "train"} else (*args, "--out", "x")
    before = sorted(path.name for path in Path().iterdir())
    result = mess(*given)
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in told[0], told[0]
    if "See 'gradrank" not in result.stderr and "requires an argument" not in told[0]:
        reads_well(told[0])
    assert sorted(path.name for path in Path().iterdir()) == before


def _shrunk_upwards() -> None:
    model = tiny_llama(1)
    wrapped = gr.apply(hand_plan(model, lambda _: 2), model)
    gr.edit(wrapped, {"model.layers.0.self_attn.q_proj": gr.Shrink(3)})


PROVOKED: dict[str, list[tuple[Callable[[Path], object], tuple[str, ...]]]] = {
    "BudgetError": [
        (lambda _: gr.Budget.parse("8x"), ("'8x'", "uniform:8")),
        (lambda _: gr.Budget.fraction(2), ("outside (0, 1]",)),
    ],
    "DataError": [
        (lambda _: gr.RunRecord.from_dict({}), ("no record", "gradrank.record/1")),
        (lambda folder: gr.RunRecord.load(folder / "absent.json"), ("does not exist",)),
    ],
    "MeasurementError": [
        (lambda folder: gr.Measurement.load(folder / "absent"), ("does not exist",)),
        (lambda _: gr.Measurement(()).gram("q"), ("'spectrum'", "Measure again")),
        (lambda _: gr.allocate([gr.Target("q", 4, 4)], "gard", 8), ("'gard'", "measure(")),
    ],
    "OptionError": [
        (lambda _: gr.Gard(energy=2.0), ("'energy'", "(0, 1]")),
        (lambda _: gr.allocate([gr.Target("q", 4, 4)], "unifrom", 8), ("'uniform'?",)),
    ],
    "OutputError": [
        (lambda folder: gr.Plan.from_dict(PLAN).save(folder / "text.txt"), ("exists already",)),
    ],
    "PlanError": [
        (lambda _: gr.Plan.from_dict({}), ("no plan", "gradrank.plan/1")),
        (lambda folder: gr.Plan.load(folder / "over.json"), ("over.json", "budget of 3")),
        (lambda _: gr.apply(gr.Plan.from_dict(PLAN), tiny_llama(1)), ("layers.0.nope",)),
    ],
    "SurgeryError": [(lambda _: _shrunk_upwards(), ("q_proj", "3"))],
    "TargetError": [
        (lambda _: gr.measure(nn.Sequential(nn.Linear(4, 4)), [], targets="q_proj"), ("q_proj",)),
    ],
}
CALLS = [
    pytest.param(name, call, words, id=f"{name}-{i}")
    for name, calls in PROVOKED.items()
    for i, (call, words) in enumerate(calls)
]


def test_every_public_error_is_provoked() -> None:
    public = {name for name in gr.__all__ if name.endswith("Error")}
    assert set(PROVOKED) == public - {"GradrankError"}


@pytest.mark.parametrize(("name", "call", "words"), CALLS)
def test_every_public_error_reads_well(mess, tmp_path, name, call, words) -> None:
    with pytest.raises(gr.GradrankError) as caught:
        call(tmp_path)
    assert type(caught.value).__name__ == name
    message = str(caught.value)
    for word in words:
        assert word in message, message
    reads_well(message)


def test_a_missing_extra_is_named_with_how_to_get_it(capsys) -> None:
    for package, extra in EXTRAS.items():
        assert explain(ModuleNotFoundError("No module", name=package), debug=False) == 2
        told = capsys.readouterr().err
        assert f"'{package}'" in told
        assert f"gradrank[{extra}]" in told


def test_help_names_every_exit_status(run) -> None:
    text = run("--help").stdout
    assert "Exit status:" in text
    assert all(re.search(rf"^  {status}\s", text, re.MULTILINE) for status in (0, 1, 2, 130))


# Completion.


def completed(*line: str) -> list[str]:
    """Return what a shell offers for the last word."""
    shell = ShellComplete(main, {}, "gradrank", completion.VARIABLE)
    *before, last = line
    return [item.value for item in shell.get_completions(list(before), last)]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (("tr",), ["train"]),
        (("plan", "--method", "ig"), ["igu", "igu-direction"]),
        (("demo", "--methods", "uniform,wat"), ["uniform,waterfill"]),
        (("train", "--task", "movie"), ["movie-review-lm", "movie-review-sentiment"]),
        (("train", "--model", "tiny-l"), ["tiny-llama"]),
        (("export", "run", "--target", "v"), ["vllm"]),
        (("plan", "--head", "ins"), ["instruct"]),
        (("methods", "dor"), ["dora"]),
        (("train", "--preset", "pilora-glue-m"), ["pilora-glue-mrpc", "pilora-glue-mnli"]),
        (("plan", "--bud"), ["--budget"]),
        (("completion", ""), ["bash", "zsh", "fish"]),
        (("nosuch", "--x"), []),
    ],
)
def test_names_are_completed(line: tuple[str, ...], offered: list[str]) -> None:
    assert completed(*line) == offered


def test_every_verb_is_completed() -> None:
    assert {"plan", "train", "doctor", "completion"} <= set(completed(""))


def test_the_names_are_those_of_the_registries() -> None:
    assert set(completion.TASKS) == set(TASKS)
    assert set(completion.MODELS) == set(known_models())
    assert completed("train", "--preset", "") == list(presets())


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_script_is_printed_for_every_shell(run, shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert completion.VARIABLE in result.stdout
    assert json.loads(run("completion", shell, "--json").stdout)["shell"] == shell
    if shutil.which(shell) and shell != "fish":
        subprocess.run([shell, "-n"], input=result.stdout, text=True, check=True)


def test_a_key_press_loads_nothing_heavy() -> None:
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'numpy', 'transformers', 'rich', 'matplotlib')\n"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules]))\n"
        "from gradrank.cli.main import main\nmain([])\n"
    )
    line = {"COMP_WORDS": "gradrank train --task tiny-i", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **line, completion.VARIABLE: "bash_complete"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["plain,tiny-images", "[]"]
