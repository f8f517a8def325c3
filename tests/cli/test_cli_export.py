"""``export`` and ``show`` on adapters, as a user meets them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from gradrank.lab.models import resolve_model

Run = Callable[..., Result]
ENGINES = ("peft", "vllm", "sglang", "llama.cpp")


def parsed(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def base() -> Any:
    return resolve_model("tiny-llama", "lm").model


def stock(folder: Path, seed: int = 0, **options: Any) -> Path:
    """A stock adapter that nobody at gradrank made, with factors that do something."""
    torch.manual_seed(seed)
    config = {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    } | options
    model = get_peft_model(base(), LoraConfig(init_lora_weights=False, **config))
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("target", ENGINES)
def test_a_run_is_exported_for_every_engine_and_told(run: Run, trained: Path, target: str) -> None:
    told = run("export", trained, "--target", target, "--out", "out")
    assert told.exit_code == 0, told.stderr
    for words in (f"target {target}", "adapter before:", "ranks:", "check:   logits differ by at "
                  "most", "the adapter changes them by", "use:"):  # fmt: skip
        assert words in told.stdout
    shown = parsed(run("show", "out", "--json"))
    assert shown["engines"][target] == {"right": True, "why": []}
    assert shown["engines"]["peft"]["right"]


@pytest.mark.parametrize("target", ENGINES)
def test_what_is_written_computes_the_same_in_stock_peft(
    run: Run, trained: Path, target: str
) -> None:
    tokens = torch.arange(12).reshape(2, 6)
    wanted = PeftModel.from_pretrained(base(), str(trained / "adapter"))(tokens).logits
    assert (wanted - base()(tokens).logits).abs().max() > 1e-3
    assert run("export", trained, "--target", target, "--out", "out").exit_code == 0
    found = PeftModel.from_pretrained(base(), "out")(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_flag_of_the_server_is_told(run: Run, tmp_path: Path) -> None:
    stock(tmp_path / "a", r=9)
    done = parsed(run("export", "a", "--model", "tiny-llama", "--target", "vllm", "--out", "o",
                      "--json"))  # fmt: skip
    assert "--max-lora-rank 16" in done["advice"][0]
    assert done["ranks"] == dict.fromkeys(done["ranks"], 9)


def test_an_adalora_adapter_of_peft_is_exported(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=6,
        target_r=3,
        total_step=10,
        lora_alpha=24,
        target_modules=["v_proj", "up_proj"],
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base(), config)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            torch.nn.init.normal_(parameter)
    tokens = torch.arange(12).reshape(2, 6)
    wanted = model.eval()(tokens).logits.detach()
    model.save_pretrained(str(tmp_path / "a"))
    done = parsed(run("export", "a", "--model", "tiny-llama", "--out", "o", "--json"))
    assert set(done["ranks"].values()) == {6}
    found = PeftModel.from_pretrained(base(), "o").eval()(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    shown = parsed(run("show", "a", "--json"))
    assert shown["engines"]["peft"]["right"]
    assert not shown["engines"]["vllm"]["right"]


def test_a_budget_makes_it_smaller_and_says_what_is_lost(run: Run, trained: Path) -> None:
    before = parsed(run("show", trained / "adapter", "--json"))
    budget = before["parameters"] // 2
    done = parsed(run("export", trained, "--budget", budget, "--out", "o", "--json"))
    losses = done["losses"]
    assert losses["parameters_after"] <= budget < losses["parameters_before"]
    assert 0 < losses["kept"] < 1
    assert done["change"] > 0
    assert parsed(run("show", "o", "--json"))["parameters"] == losses["parameters_after"]
    told = run("export", trained, "--budget", budget, "--out", "p").stdout
    assert "of the energy of all updates is kept" in told
    assert "logits change by at most" in told


def test_a_rank_cuts_every_update(run: Run, tmp_path: Path) -> None:
    stock(tmp_path / "a", r=4)
    done = parsed(run("export", "a", "--model", "tiny-llama", "--rank", 2, "--out", "o", "--json"))
    assert set(done["ranks"].values()) == {2}


def test_adapters_are_added_up(run: Run, tmp_path: Path) -> None:
    stock(tmp_path / "a", 1, r=4, lora_alpha=16)
    stock(tmp_path / "b", 2, r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    done = parsed(run("export", "a", "b", "--weight", 0.5, "--weight", "-2", "--model",
                      "tiny-llama", "--out", "o", "--json"))  # fmt: skip
    assert done["sum_difference"] < 1e-3
    ranks = {name.rpartition(".")[2]: rank for name, rank in done["ranks"].items()}
    assert ranks == {"q_proj": 6, "down_proj": 4, "v_proj": 2}
    one, two, both = (load(tmp_path / name) for name in "abo")
    for name, found in both.items():
        wanted = 0.5 * one.get(name, 0) - 2 * two.get(name, 0)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Updates in a folder, by PEFT's own reading."""
    model: Any = PeftModel.from_pretrained(base(), str(folder))
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def test_numbers_are_written_in_the_type_asked_for(run: Run, trained: Path) -> None:
    done = run("export", trained, "--save-dtype", "bfloat16", "--target", "vllm", "--out", "o")
    assert done.exit_code == 0, done.stderr
    found = load_file("o/adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_show_tells_energy_and_engines(run: Run, trained: Path) -> None:
    told = run("show", trained / "adapter")
    assert told.exit_code == 0, told.stderr
    for words in ("energy, % of all updates,", "squared Frobenius norm", "as it is stored:",
                  "loads it rightly", *ENGINES):  # fmt: skip
        assert words in told.stdout
    shown = parsed(run("show", trained / "adapter", "--json"))
    assert sum(own["share"] for own in shown["energy"].values()) == pytest.approx(1)


def test_show_says_why_an_engine_would_be_wrong(run: Run, tmp_path: Path) -> None:
    stock(tmp_path / "a", alpha_pattern={"q_proj": 8}, rank_pattern={"q_proj": 2})
    shown = parsed(run("show", "a", "--json"))["engines"]
    assert shown["peft"]["right"]
    assert "rank 2" in " ".join(shown["sglang"]["why"])
    stock(tmp_path / "b", alpha_pattern={"q_proj": 8})
    shown = parsed(run("show", "b", "--json"))["engines"]
    for name in ("vllm", "sglang", "llama.cpp"):
        assert "alpha_pattern" in " ".join(shown[name]["why"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--target", "triton"), "'triton' is unknown"),
        (("--padding", "none", "--target", "sglang"), "padding 'none' does not serve sglang"),
        (("--padding", "all", "--target", "merged"), "writes no adapter"),
        (("--budget", "3"), "below the floor"),
        (("--budget", "lots"), "lots"),
        (("--budget", "100", "--rank", "2"), "Give one of them"),
        (("--weight", "1", "--weight", "2"), "adapters (1) and of weights (2) differ"),
        (("--weight", "nan"), "no finite number"),
        (("--requantise",), "target 'merged'"),
        (("--requantise", "--target", "merged"), "not quantised"),
    ],
)
def test_what_does_not_go_together_is_refused(
    run: Run, trained: Path, flags: tuple[str, ...], words: str
) -> None:
    refused = run("export", trained, *flags, "--out", "o")
    assert refused.exit_code == 2
    assert words in " ".join(refused.stderr.split())
    assert not Path("o").exists()


def test_a_trained_head_is_refused_by_name_where_a_server_has_no_place_for_it(
    run: Run, tmp_path: Path
) -> None:
    stock(tmp_path / "a", modules_to_save=["lm_head"])
    for target in ("vllm", "sglang", "llama.cpp"):
        refused = run("export", "a", "--model", "tiny-llama", "--target", target, "--out", "o")
        assert refused.exit_code == 2
        assert "modules_to_save: lm_head" in refused.stderr
        assert "merged" in refused.stderr
    assert run("export", "a", "--model", "tiny-llama", "--target", "merged", "--out",
               "o").exit_code == 0  # fmt: skip


def test_a_hostile_adapter_is_refused_in_words(run: Run, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "a")
    found = load_file("a/adapter_model.safetensors")
    next(iter(found.values())).view(-1)[0] = float("nan")
    save_file(found, "a/adapter_model.safetensors")
    for verb in (("show", "a"), ("export", "a", "--model", "tiny-llama", "--out", "o")):
        refused = run(*verb)
        assert refused.exit_code == 2
        assert "NaN or infinity" in refused.stderr
        assert "Traceback" not in refused.stderr
