"""A plain PyTorch loop with a static plan: measure, allocate, train, save.

python examples/loop_static.py --model smollm2-135m --steps 20 --out out/loop-static
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import get_peft_model
from sample import model_folder, sentences, token_rows
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

import gradrank as gr


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--budget", default="uniform:4")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="out/loop-static")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = model_folder(args.model)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    rows = token_rows(AutoTokenizer.from_pretrained(folder), sentences(args.data))
    loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=default_data_collator)

    # The two lines that differ from a script with uniform ranks.
    plan = gr.plan(model, loader, method="gard", budget=args.budget, num_batches=8)
    model = get_peft_model(model, plan.lora_config(lora_alpha=16, task_type="CAUSAL_LM"))
    print(plan)
    print(plan.reliability["recommendation"], "-", plan.reliability["reason"])

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for step, batch in enumerate(itertools.islice(epochs, args.steps), start=1):
        loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.3f}")

    model.save_pretrained(args.out)  # a stock PEFT adapter


if __name__ == "__main__":
    main()
