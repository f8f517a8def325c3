import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cli.cli_cases import invoke
from gradrank.cli.tables import rank_maps
from gradrank.core.errors import DataError
from gradrank.core.plan import Plan
from gradrank.core.targets import Target
from gradrank.methods.registry import METHODS
from gradrank.serving.facts import describe as read_adapter


def text_of(*items: object) -> str:
    import rich.console

    console = rich.console.Console(width=160, record=True, file=io.StringIO())
    for item in items:
        console.print(item)
    return console.export_text()


def test_a_plan_and_its_adapter_tell_the_same_ranks(planned, trained) -> None:
    plan = Plan.load(planned / "plan.json")
    shown = json.loads(invoke("show", trained, "--json").stdout)
    assert shown["kind"] == "plan"
    assert shown["ranks"] == plan.ranks
    adapter = json.loads(invoke("show", trained / "adapter", "--json").stdout)
    assert adapter["kind"] == "adapter"
    assert adapter["ranks"] == {name: rank for name, rank in plan.ranks.items() if rank}
    assert adapter["parameters"] == plan.parameters
    assert set(adapter["scales"].values()) == {16 / plan.reference_rank}


def test_show_prints_ranks_parameters_scale_and_reliability(planned, trained) -> None:
    plan = invoke("show", planned / "plan.json").stdout
    for words in ("layer", "q_proj", "adapter parameters", "reliability:", "lora_alpha /"):
        assert words in plan
    assert "for every target" in invoke("show", trained / "adapter").stdout


def test_show_of_a_plan_loads_no_torch(trained) -> None:
    import subprocess

    code = (
        "import sys\nfrom gradrank.cli.main import main\n"
        "try:\n    main(['show', sys.argv[1], '--quiet'])\nexcept SystemExit as end:\n"
        "    assert not end.code\nprint('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(trained)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def adapter(folder: Path, config: dict, **shapes: tuple[int, int, int]) -> Path:
    """Write an adapter: name -> (rank, d_in, d_out), dots in names written as two underscores."""
    tensors = {}
    for name, (rank, d_in, d_out) in shapes.items():
        stem = "base_model.model." + name.replace("__", ".")
        tensors[f"{stem}.lora_A.weight"] = torch.zeros(rank, d_in)
        tensors[f"{stem}.lora_B.weight"] = torch.zeros(d_out, rank)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_scales_follow_patterns_as_peft_reads_them(tmp_path) -> None:
    config = {
        "peft_type": "LORA",
        "lora_alpha": 8,
        "alpha_pattern": {"^enc\\.q": 6, "v": 10},
        "base_model_name_or_path": "base",
    }
    shapes = {"enc__q": (2, 4, 4), "vision__enc__q": (4, 4, 4), "enc__v": (5, 4, 6)}
    facts = read_adapter(adapter(tmp_path / "a", config, **shapes))
    assert facts.scales == {"enc.q": 3.0, "vision.enc.q": 2.0, "enc.v": 2.0}
    assert facts.parameters == 2 * 8 + 4 * 8 + 5 * 10
    rooted = read_adapter(adapter(tmp_path / "b", config | {"use_rslora": True}, enc__q=(4, 8, 8)))
    assert rooted.scales == {"enc.q": 6 / math.sqrt(4)}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({}, "None"),
        ([], "None"),
        ({"peft_type": "LORA", "lora_alpha": "x"}, "x"),
    ],
)
def test_what_is_no_lora_adapter_is_refused(tmp_path, config, words) -> None:
    folder = adapter(tmp_path / "a", config, q=(2, 4, 4))
    with pytest.raises(DataError, match=words):
        read_adapter(folder)


def test_a_damaged_adapter_is_refused(tmp_path) -> None:
    folder = adapter(tmp_path / "a", {"peft_type": "LORA"}, q=(2, 4, 4))
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(DataError, match="damaged"):
        read_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match="pickles are not read"):
        read_adapter(folder)


def test_layers_are_in_order_and_lack_of_a_module_is_blank() -> None:
    names = ["h.2.q", "h.10.q", "h.10.mlp.o", "h.10.attn.o", "head"]
    targets = [Target(name, 4, 4) for name in names]
    ranks = dict(zip(names, (1, 0, 22, 33, 7), strict=True))
    shown = text_of(*rank_maps(targets, ranks))
    rows = [line.split() for line in shown.splitlines()]
    assert ["layer", "q", "mlp.o", "attn.o"] in rows
    assert ["2", "1"] in rows
    assert ["10", "·", "22", "33"] in rows
    assert ["-", "7"] in rows


def test_hostile_names_do_not_reach_the_terminal(planned, tmp_path) -> None:
    data = json.loads((planned / "plan.json").read_text(encoding="utf-8"))
    data["method"]["name"] = "\u001b[31mred[/] [bold]"
    name, first = next(iter(data["targets"].items()))
    data["targets"] = {"\u001b]0;title\u0007" + name: first}
    data["parameters"] = 0
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    result = invoke("show", path)
    assert result.exit_code == 0, result.stderr
    assert "\u001b" not in result.stdout
    assert "\u0007" not in result.stdout
    assert "[bold]" in result.stdout


def test_methods_are_listed_with_source_and_options() -> None:
    listed = json.loads(invoke("methods", "--json").stdout)["methods"]
    assert [row["name"] for row in listed] == list(METHODS)
    assert all(row["source"] and row["summary"] for row in listed)
    gard = json.loads(invoke("methods", "gard", "--json").stdout)
    assert {"name": "energy", "default": 0.9}.items() <= gard["options"][0].items()
    assert "--option energy=0.9" in invoke("methods", "gard").stdout
    assert "no options" in invoke("methods", "uniform").stdout


def test_tasks_are_listed_with_source() -> None:
    listed = json.loads(invoke("tasks", "--json").stdout)["tasks"]
    assert {"tiny-lm", "movie-review-lm"} <= {row["name"] for row in listed}
    assert all(row["source"] and row["licence"] for row in listed)
    assert "tiny-lm" in invoke("tasks").stdout
