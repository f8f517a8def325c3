from pathlib import Path

import click
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cli.cli_cases import TINY, invoke
from gradrank.cli import runfile, settings
from gradrank.cli.options import DATA, MEASURING, METHOD, RUNNING, TRAINING, flags
from gradrank.cli.verb import Verb
from gradrank.core.errors import DataError, OptionError


@click.command(cls=Verb)
@flags(*DATA, *METHOD, *MEASURING, *TRAINING, *RUNNING, "config")
@click.pass_context
def probe(context: click.Context, **values: object) -> settings.Settings:
    return settings.collect(context, values)


def collected(*args: object) -> settings.Settings:
    return probe.main([str(arg) for arg in args], standalone_mode=False)


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path) -> None:
    path = config(tmp_path, "model: m\nsteps: 7\nlr: 1e-3\nbatch-size: 3\nbudget: 5000\n")
    found = collected("--config", path, "--steps", 9)
    assert (found.model, found.steps, found.lr) == ("m", 9, 1e-3)
    assert (found.batch_size, found.budget, found.batches) == (3, "5000", 32)


def test_flags_may_come_before_the_file(tmp_path) -> None:
    assert collected("--steps", 9, "--config", config(tmp_path, "steps: 7\n")).steps == 9


@pytest.mark.parametrize(
    ("text", "args", "options"),
    [
        ("option: {energy: 0.8, r_max: null}", (), {"energy": "0.8", "r_max": "none"}),
        ("option: [energy=0.8]", (), {"energy": "0.8"}),
        ("option: {energy: 0.8}", ("--option", "r_min=1"), {"energy": "0.8", "r_min": "1"}),
        ("option: {energy: 0.8}", ("--option", "energy=0.7"), {"energy": "0.7"}),
        ("option: {energy: 0.8}", ("--method", "gard"), {"energy": "0.8"}),
        ("method: gard\noption: {energy: 0.8}", ("--method", "uniform"), {}),
    ],
)
def test_options_of_file_and_flags_are_merged(tmp_path, text, args, options) -> None:
    assert collected("--config", config(tmp_path, text), *args).options == options


def test_targets_may_be_a_list(tmp_path) -> None:
    path = config(tmp_path, "targets: [q_proj, v_proj]\n")
    assert collected("--config", path).targets == "q_proj,v_proj"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz: 3", ("unknown key 'stepz'", "Did you mean 'steps'?")),
        ("steps: many", ("key 'steps' is 'many'", "whole number")),
        ("steps: 2.5", ("key 'steps' is 2.5", "whole number")),
        ("steps: true", ("key 'steps' is True", "whole number")),
        ("steps: 0", ("key 'steps'", "0")),
        ("lr: fast", ("key 'lr'", "fast")),
        ("lr: -1.0", ("key 'lr'", "-1")),
        ("model: 3", ("key 'model' is 3", "a text")),
        ("gradient_checkpointing: 1", ("true or false",)),
        ("head: lmm", ("key 'head'", "lmm")),
        ("option: 3", ("key 'option' is 3", "list of texts")),
        ("- a\n- b", ("list", "keys to values")),
        ("a: [", ("not valid YAML",)),
        ("a: !!python/object/apply:os.getcwd []", ("not valid YAML",)),
    ],
)
def test_wrong_files_are_named_with_key_and_value(tmp_path, text, words) -> None:
    path = config(tmp_path, text)
    with pytest.raises((OptionError, DataError)) as caught:
        collected("--config", path)
    for word in ("run.yaml", *words):
        assert word in str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"absent\.yaml' does not exist"):
        collected("--config", tmp_path / "absent.yaml")
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="could not be read"):
        collected("--config", tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_bytes(b" " * (2 << 20))
    with pytest.raises(DataError, match="64 KiB"):
        collected("--config", tmp_path / "run.yaml")


def test_an_empty_file_changes_nothing(tmp_path) -> None:
    assert collected("--config", config(tmp_path, "# nothing\n")) == collected()


@given(
    steps=st.integers(1, 10**6),
    lr=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**31),
    model=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1).filter(
        lambda text: not text.startswith("-")
    ),
    checkpointing=st.booleans(),
    energy=st.floats(0.01, 1),
)
def test_what_a_run_writes_replays_it(
    tmp_path_factory, steps, lr, seed, model, checkpointing, energy
) -> None:
    folder = tmp_path_factory.mktemp("replay")
    more = ("--gradient-checkpointing",) if checkpointing else ()
    first = collected(
        "--steps",
        steps,
        "--lr",
        repr(lr),
        "--seed",
        seed,
        "--model",
        model,
        *more,
        "--option",
        f"energy={energy!r}",
        "--out",
        folder / "a",
        "--overwrite",
    )
    runfile.write(folder / "config.yaml", first.replay(), "train")
    again = collected("--config", folder / "config.yaml", "--out", folder / "a", "--overwrite")
    assert again == first


def test_where_it_is_written_is_not_replayed(tmp_path) -> None:
    written = collected("--out", tmp_path / "a", "--overwrite").replay()
    assert not {"out", "overwrite", "json", "quiet"} & set(written)


def test_every_key_of_a_file_is_a_flag_of_train() -> None:
    from gradrank.cli.train import command

    known = {runfile.key_of(p) for p in command.params}
    assert {*DATA, *METHOD, *MEASURING, *TRAINING, *RUNNING} <= known


def test_keys_of_the_other_verb_are_told_but_no_mistake(run) -> None:
    Path("run.yaml").write_text(yaml.safe_dump({"lr": 0.1, "steps": 3}), encoding="utf-8")
    result = run("plan", *TINY, "--config", "run.yaml", "--method", "grad", "--out", "x")
    assert "not used by 'plan': lr, steps" in result.stderr
    assert "Did you mean 'gard'?" in result.stderr
    only_own = run("show", "x", "--config", "run.yaml")
    assert "unknown key 'lr'" in only_own.stderr


def test_only_the_command_line_may_ask_for_code_to_run(tmp_path) -> None:
    path = config(tmp_path, "trust_remote_code: true\n")
    with pytest.raises(OptionError, match=r"(?s)a file may not ask.*add --trust-remote-code"):
        collected("--config", path)
    assert collected("--config", path, "--trust-remote-code").trust_remote_code
    off = config(tmp_path, "trust_remote_code: false\n")
    assert not collected("--config", off).trust_remote_code


def test_a_resumed_run_does_not_run_code_by_itself(tmp_path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "plan.json").write_text("{}", encoding="utf-8")
    (out / "config.yaml").write_text("model: m\ntask: t\ntrust_remote_code: true\n", "utf-8")
    result = invoke("train", "--out", out, "--resume")
    assert result.exit_code == 2
    assert "a file may not ask for that" in result.stderr.replace("\n", " ")
