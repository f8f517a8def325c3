"""A plan for programs that make the LoRA configuration themselves (axolotl, LLaMA-Factory).

gradrank plan --model smollm2-135m --task movie-review-lm --budget uniform:4 --out out/plan
python examples/written_pattern.py out/plan/plan.json --out out/pattern

Writes ``axolotl.yaml``, keys to add to an axolotl configuration (0.18 or newer), and ``adapter``,
an untrained adapter with the plan's ranks for programs that have no key for them but go on with
an adapter that they are given.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from sample import model_folder
from transformers import AutoModelForCausalLM

import gradrank as gr


def axolotl_keys(config: Any) -> dict[str, Any]:
    targets = config.target_modules  # a name list, or one expression where names are ambiguous
    keys = {
        "adapter": "lora",
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_target_linear": False,
        "lora_target_modules": targets if isinstance(targets, str) else sorted(targets),
        "lora_rank_pattern": config.rank_pattern,
        "lora_alpha_pattern": config.alpha_pattern,
    }
    return {key: value for key, value in keys.items() if value not in ({}, None)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--scale", type=int, default=2, help="lora_alpha / lora_r")
    parser.add_argument("--out", type=Path, default=Path("out/pattern"))
    args = parser.parse_args(argv)

    plan = gr.Plan.load(args.plan)
    # axolotl takes whole alphas only: a whole scale gives each module one.
    alpha = args.scale * plan.reference_rank
    config = plan.lora_config(lora_alpha=alpha, task_type="CAUSAL_LM")
    args.out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(axolotl_keys(config), sort_keys=False, width=10_000)
    (args.out / "axolotl.yaml").write_text(text, encoding="utf-8")

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder(args.model))
    adapted = gr.apply(plan, model, lora_alpha=alpha, task_type="CAUSAL_LM")
    adapted.save_pretrained(args.out / "adapter")
    print(plan)
    print(f"axolotl:       the keys of {args.out / 'axolotl.yaml'}")
    print(f"LLaMA-Factory: adapter_name_or_path: {args.out / 'adapter'}")


if __name__ == "__main__":
    main()
