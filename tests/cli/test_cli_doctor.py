"""The doctor: what it finds, what it tries, and that nothing that is broken breaks it."""

import json
import shutil
from pathlib import Path

import pytest

from cli.cli_cases import invoke
from gradrank.cli import doctor, doctor_machine, doctor_packages
from gradrank.cli.doctor_child import try_out
from gradrank.cli.doctor_findings import NO, NOTE, OK, Finding, guarded, homely
from gradrank.cli.doctor_path import examine
from gradrank.cli.doctor_trials import TARGETS, TRIALS, Bench

ROOT = Path(__file__).parents[2]
FAKE = """\
import json, os, sys, time
def tell(**what):
    print(json.dumps(what), flush=True)
print("a library says hello", flush=True)
for name in sys.argv[1:]:
    tell(begun=name)
    if name == "dies":
        os.abort()
    if name == "hangs":
        time.sleep(60)
    tell(ended=name, findings=[dict(section="s", name=name, status="ok", text="fine")])
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "fake_trials.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "fake_trials"


def statuses(found: list[Finding]) -> dict[str, str]:
    return {one.name: one.status for one in found}


def test_a_quick_look_is_one_json_object_and_loads_nothing_heavy(run) -> None:
    result = run("doctor", "--quick", "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 0
    assert told["ok"] is True
    assert told["tried"] is False
    names = {one["name"]: one for one in told["findings"]}
    assert {"python", "torch", "peft", "processor", "memory", "threads", "network"} <= set(names)
    assert all(one["status"] in {OK, NOTE, NO} for one in told["findings"])
    assert "accepted: >=" in names["torch"]["text"]


def test_lines_have_headings_marks_and_remedies(run) -> None:
    text = run("doctor", "--quick").stdout
    for heading in ("packages:", "machine:", "settings:"):
        assert heading in text
    assert "  ok   python" in text
    assert text.splitlines()[-1].endswith("nothing was tried.")


@pytest.mark.parametrize("name", [name for name in TRIALS if name != "export"])
def test_every_trial_tells_something(name: str, tmp_path: Path) -> None:
    found = list(TRIALS[name](Bench(tmp_path)))
    assert found or name == "imports"
    assert all(one.text for one in found)
    if name in {"plan and train", "capacity that moves", "compare --workers"}:
        assert {one.status for one in found} == {OK}
    if name == "report with PNG figures":
        assert (tmp_path / "trial.png").read_bytes().startswith(b"\x89PNG")


def test_every_export_target_is_tried(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert [one.status for one in TRIALS["export"](bench)] == [NO]
    list(TRIALS["plan and train"](bench))
    found = list(TRIALS["export"](bench))
    assert [one.name for one in found] == [f"export to {target}" for target in TARGETS]
    assert {one.status for one in found} == {OK}


def test_a_child_process_brings_back_what_it_found() -> None:
    heard: list[str] = []
    found = try_out(["compare --workers"], heard.append)
    assert statuses(found) == {"compare --workers": OK}
    assert heard == ["compare --workers"]


def test_a_trial_that_kills_its_process_costs_only_itself(fake: str) -> None:
    found = try_out(["first", "dies", "last"], None, fake)
    assert statuses(found) == {"first": OK, "dies": NO, "last": OK}
    broken = next(one for one in found if one.status == NO)
    assert "signal" in broken.text
    assert "dies" in broken.remedy


def test_a_trial_that_hangs_is_stopped(fake: str) -> None:
    found = try_out(["hangs"], None, fake, limit=1)
    assert statuses(found) == {"hangs": NO}
    assert "did not end within 1 s" in found[0].text


def test_a_child_that_cannot_start_is_told_once() -> None:
    found = try_out(["plan and train", "export"], None, "gradrank.no_such_module")
    assert statuses(found) == {"plan and train": NO}
    assert found[0].breaks


def test_a_probe_that_fails_becomes_a_finding() -> None:
    def probe() -> list[Finding]:
        raise RuntimeError("libcuda.so\nis not there")

    (found,) = guarded("devices", "cuda", probe)
    assert (found.status, found.text) == (NO, "RuntimeError: libcuda.so is not there")


@pytest.mark.parametrize(
    ("version", "wanted", "needed", "status", "words"),
    [
        ("2.13.0+cpu", ">=2.6", True, OK, "tested"),
        ("99.0", ">=2.6", True, NOTE, "newer than what was tested"),
        ("2.5.1", ">=2.6", True, NO, "outside"),
        (None, ">=2.6", True, NO, "not installed"),
    ],
)
def test_versions_are_judged(version, wanted, needed, status, words) -> None:
    found = doctor_packages.judge("torch", version, wanted, needed)
    assert found.status == status
    assert words in found.text
    assert found.breaks == (status == NO)
    assert status != NO or "pip install 'torch>=2.6'" in found.remedy


def test_an_optional_package_that_is_absent_breaks_nothing() -> None:
    found = doctor_packages.judge("datasets", None, ">=4.0", False)
    assert (found.status, found.breaks) == (NOTE, False)
    assert "gradrank[train]" in found.remedy


def test_what_was_tested_is_what_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert {name: pins[name] for name in doctor_packages.TESTED} == doctor_packages.TESTED


def test_known_problems_belong_to_versions() -> None:
    none = doctor_packages.problem_findings({"peft": "0.99", "transformers": "9.0"})
    assert none == []
    found = doctor_packages.problem_findings({"vllm": "0.33.0"})
    assert [one.name for one in found] == ["vllm"]
    assert "--target vllm" in found[0].remedy


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({}, OK),
        ({"OMP_NUM_THREADS": "4"}, OK),
        ({"OMP_NUM_THREADS": "1"}, NOTE),
        ({"MKL_NUM_THREADS": "64"}, NOTE),
        ({"OMP_NUM_THREADS": "many"}, NO),
        ({"OMP_NUM_THREADS": "0"}, NO),
    ],
)
def test_threads_settings_are_judged(environment, status) -> None:
    assert doctor_machine.thread_finding(environment, 4).status == status


def test_working_without_network_is_told() -> None:
    assert doctor_machine.network_finding({}).status == OK
    found = doctor_machine.network_finding({"HF_HUB_OFFLINE": "1"})
    assert (found.status, "HF_HUB_OFFLINE" in found.remedy) == (NOTE, True)


def test_a_damaged_cache_entry_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRADRANK_CACHE", str(tmp_path))
    (tmp_path / "assets" / "thing-1").mkdir(parents=True)
    found = statuses(doctor_machine.cache_findings())
    assert found == {"cache": OK, "cache, thing-1": NOTE}


def test_home_folders_are_not_spelt_out() -> None:
    assert homely(Path.home() / "cache") == str(Path("~") / "cache")
    assert homely("/elsewhere") == "/elsewhere"


def test_the_exit_status_says_whether_the_main_job_works(run, monkeypatch) -> None:
    broken = Finding("packages", "torch", NO, "not installed", "pip install torch", vital=True)
    for vital, status in ((True, 1), (False, 0)):
        one = Finding(**{**broken.to_dict(), "vital": vital})
        monkeypatch.setattr(doctor, "look", lambda one=one: [one])
        result = run("doctor", "--quick")
        assert result.exit_code == status
        assert "-> pip install torch" in result.stdout


def test_whole_runs_plans_and_adapters_are_told_so(run, planned, trained) -> None:
    for path in (planned, planned / "plan.json", trained, trained / "adapter"):
        result = run("doctor", path, "--json")
        told = json.loads(result.stdout)
        assert result.exit_code == 0, told
        assert told["ok"] is True
    names = {one["name"] for one in told["findings"]}
    assert "adapter" in names
    text = run("doctor", trained).stdout
    assert "record and adapter" in text
    assert text.rstrip().endswith("is whole.")


@pytest.mark.parametrize(
    "name",
    ["plan.json", "record.json", "measurement.safetensors", "config.yaml",
     "adapter/adapter_model.safetensors", "adapter/adapter_config.json"],
)  # fmt: skip
def test_damage_is_found_wherever_it_is(name, trained, planned, tmp_path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    if not (folder / name).is_file():
        shutil.copy(planned / name, folder / name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(b"{" + content[: len(content) // 2])
    result = invoke("doctor", folder)
    assert result.exit_code == 1
    assert "  NO   " in result.stdout
    assert "is damaged: " in result.stdout.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_model_folder_is_examined(tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert statuses(examine(folder))["weights"] == NO
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "pickle" in examine(folder)[0].text
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    found = statuses(examine(folder))
    assert (found["model"], found["tokenizer"]) == (OK, NOTE)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert statuses(examine(folder))["model.safetensors"] == NO


def test_leavings_of_killed_processes_and_strange_folders_are_told(tmp_path) -> None:
    (tmp_path / ".plan.json.abc.tmp").write_text("half", encoding="utf-8")
    assert statuses(examine(tmp_path))["left over"] == NOTE
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert examine(tmp_path / "notes.txt")[0].text == "nothing that gradrank reads"


def test_a_path_that_is_not_there_is_refused(run) -> None:
    result = run("doctor", "absent")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: 'absent' does not exist.")
