"""The mixed-rank adapter that the proofs against real engines serve, in both forms.

Used by ``proof_vllm.py`` and ``proof_sglang.py``; it has no program of its own.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import gradrank as gr
from gradrank.core.budget import Budget
from gradrank.core.errors import PlanError
from gradrank.core.plan import Plan
from gradrank.core.planned import PlannedTarget
from gradrank.serving.adapter import Adapter
from gradrank.serving.engines.engine import Base, Engine
from gradrank.serving.facts import describe
from gradrank.serving.installing import taken
from gradrank.serving.padding import padded
from gradrank.signals.facts import find_targets, model_facts

# A short vocabulary: no adapter here touches it.
SHAPES = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
# Over the targets in turn: every fused group is met whole, in part and not at all.
RANKS = (2, 0, 3, 1, 8, 0, 5, 4, 4, 0, 16)
# Ordinary adapters that touch every rule by which an engine reads.
VARIANTS: dict[str, dict[str, Any]] = {
    "uniform": {"target_modules": "all-linear"},
    "uniform, rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "q": {"target_modules": ["q_proj"]},
    "k and v": {"target_modules": ["k_proj", "v_proj"]},
    "gate": {"target_modules": ["gate_proj"]},
    "up": {"target_modules": ["up_proj"]},
    "o and down": {"target_modules": ["o_proj", "down_proj"]},
    "an expression": {"target_modules": ".*(q|k|v)_proj"},
    "alpha by module": {"target_modules": ["o_proj"], "alpha_pattern": {"layers.1.*": 12}},
    "rank by module": {"target_modules": ["o_proj"], "rank_pattern": {"layers.1.*": 9}},
    "rank within qkv": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    "DoRA": {"target_modules": ["o_proj"], "use_dora": True},
    "biases": {"target_modules": ["o_proj"], "lora_bias": True},
    "a whole module": {"target_modules": ["o_proj"], "modules_to_save": ["norm"]},
}
POLICIES = ("constant", "alpha/r", "rslora")
# What the engines raise.
FAILURES = (ValueError, RuntimeError, AssertionError, KeyError, NotImplementedError)


@dataclass(frozen=True)
class Case:
    """One adapter, written twice.

    Attributes:
        config: The base model's configuration.
        adapter: As trained.
        exported: Folder in our form.
        ordinary: Folder as PEFT saves it.
    """

    config: LlamaConfig
    adapter: Adapter
    exported: Path
    ordinary: Path


@dataclass(frozen=True)
class Finding:
    """How far an engine's updates are from the true ones.

    Attributes:
        worst: Largest absolute difference over all targets.
        relative: Largest difference of a target, relative to its own largest entry.
        where: Target of the largest relative difference.
        wrong: Targets that are off by more than a thousandth (in bfloat16: a thirtieth).
        ratio: Scale that the engine used over the true one, where it is most wrong.
        targets: Targets compared.
    """

    worst: float
    relative: float
    where: str
    wrong: int
    ratio: float
    targets: int


def arguments(text: str) -> argparse.Namespace:
    """Read the command line.

    Args:
        text: What the program is for.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", choices=(*SHAPES, "both"), default="both")
    parser.add_argument("--policy", choices=POLICIES, default="constant")
    parser.add_argument(
        "--double",
        action="store_true",
        help="compare the test double with the engine on ordinary adapters instead",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


@contextlib.contextmanager
def case(shapes: str, engine: Engine, policy: str, dtype: str) -> Iterator[Case]:
    """Make an adapter as if it had been trained, and write both forms.

    Args:
        shapes: A key of :data:`SHAPES`.
        engine: Whose form to write.
        policy: How scales follow ranks.
        dtype: Of the factors in both folders.

    Yields:
        The case; its folders are removed afterwards.
    """
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, max_position_embeddings=64, **SHAPES[shapes])
    base = LlamaForCausalLM(config)
    targets = find_targets(base, "all-linear")
    planned = tuple(PlannedTarget(t, RANKS[i % len(RANKS)]) for i, t in enumerate(targets))
    spent = sum(item.parameters for item in planned)
    facts = model_facts(base, "all-linear")
    plan = Plan("hand", {}, Budget.parameters(spent), spent, planned, provenance=facts)
    model: Any = gr.apply(plan, base, policy=policy)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    kind = getattr(torch, dtype)
    adapter = taken(model).to(kind)
    known = {t.name: (t.d_out, t.d_in) for t in targets}
    modules = tuple(name for name, _ in LlamaForCausalLM(config).named_modules())
    with TemporaryDirectory(prefix="gradrank-proof-") as held:
        exported, ordinary = Path(held) / "exported", Path(held) / "ordinary"
        exported.mkdir()
        made = padded(adapter, engine.pads, known)
        engine.write(made, exported, Base(config.to_dict(), modules))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(kind)
        model.save_pretrained(str(ordinary))
        yield Case(config, adapter, exported, ordinary)


def check_double(engine: Engine, serve: Callable[[Any, Path, int], dict[str, Tensor]]) -> None:
    """Print for ordinary adapters whether the test double reads them as the engine does.

    Args:
        engine: The engine.
        serve: Loads a folder into the real engine: configuration, folder, largest rank; returns
            what its layers add, by module.
    """
    config = LlamaConfig(vocab_size=64, max_position_embeddings=64, **SHAPES["tiny"])
    for name, options in VARIANTS.items():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        modules = tuple(module for module, _ in model.named_modules())
        wrapped: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
        for key, parameter in wrapped.named_parameters():
            if ".lora_" in key and "magnitude" not in key:
                parameter.data = 0.1 * torch.randn(parameter.shape)
        with TemporaryDirectory(prefix="gradrank-proof-") as held:
            wrapped.save_pretrained(held)
            real, double = "loads", "loads"
            found, told_of = {}, {}
            try:
                found = serve(config, Path(held), 4)
            except FAILURES as error:
                real = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
            try:
                read = engine.read(Path(held), Base(config.to_dict(), modules))
                told_of = {u.name: u.delta() for u in read.updates.values()}
            except PlanError as error:
                double = f"refuses: {str(error)[:90]}"
            agree = (real == "loads") == (double == "loads") and all(
                float((delta - told_of.get(key, torch.zeros_like(delta))).abs().max()) < 1e-6
                for key, delta in ((k, d.double()) for k, d in found.items())
            )
            judged = _judged(engine, Path(held))
        verdict = "agree " if agree else "DIFFER"
        print(f"{verdict} {name:16} engine {real} | double {double} | judge {judged}", flush=True)


def _judged(engine: Engine, folder: Path) -> str:
    return "; ".join(engine.judge(describe(folder)))[:110] or "serves it"


def compared(adapter: Adapter, found: dict[str, Tensor]) -> Finding:
    """Compare what an engine adds to every weight with what it should add.

    Args:
        adapter: As trained.
        found: ``[d_out, d_in]`` by module; all modules that the engine can adapt.
    """
    worst = relative = 0.0
    ratio, where, wrong = 1.0, "-", 0
    kind = next(iter(adapter.updates.values())).a.dtype
    allowed = max(1e-3, 4 * torch.finfo(kind).eps)
    for name, delta in found.items():
        update = adapter.updates.get(name)
        true = torch.zeros_like(delta).double() if update is None else update.delta()
        off = float((delta.double() - true).abs().max())
        size = float(true.abs().max())
        share = off / size if size else float(off > 0)
        worst, wrong = max(worst, off), wrong + (share > allowed)
        if share > relative:
            relative, where = share, name
            ratio = float((delta.double() * true).sum() / true.square().sum()) if size else 0.0
    missing = set(adapter.updates) - set(found)
    assert not missing, f"the engine has no place for {sorted(missing)[:3]}"
    return Finding(worst, relative, where, wrong, ratio, len(found))


def told(shapes: str, form: str, outcome: Finding | Exception) -> None:
    """Print one line.

    Args:
        shapes: A key of :data:`SHAPES`.
        form: Which of both folders.
        outcome: What came of it.
    """
    if isinstance(outcome, Exception):
        text = f"{type(outcome).__name__}: {str(outcome).splitlines()[0][:150]}"
    else:
        text = (
            f"largest difference {outcome.worst:.2e} ({outcome.relative:.1e} of the target's "
            f"largest entry, {outcome.where}); wrong: {outcome.wrong} of {outcome.targets} targets"
        )
        if outcome.wrong:
            text += f", update there is {outcome.ratio:.3g} times the true one"
    print(f"{shapes:13} {form:9} {text}", flush=True)
