"""A plain PyTorch loop in which ranks move while training.

python examples/loop_dynamic.py --model smollm2-135m --steps 20 --out out/loop-dynamic
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from sample import model_folder, sentences, token_rows
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

import gradrank as gr


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--out", default="out/loop-dynamic")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = model_folder(args.model)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    rows = token_rows(AutoTokenizer.from_pretrained(folder), sentences(args.data))
    loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=default_data_collator)

    lora = LoraConfig(r=args.rank, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(model, lora)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3)
    method = gr.DynamicGard(interval=args.interval, window=args.interval, energy=0.7)
    budget = gr.Budget.uniform(args.rank)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    with gr.Controller(model, optimizer, method, budget, total_steps=args.steps) as controller:
        for step, batch in enumerate(itertools.islice(epochs, args.steps), start=1):
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
            loss.backward()
            optimizer.step()
            report = controller.step()  # the one line inside the loop
            optimizer.zero_grad()
            moved = f", {report.moved:,} parameters moved" if report else ""
            print(f"step {step} loss {loss.item():.3f}{moved}")

    model.save_pretrained(args.out)  # a stock PEFT adapter, at every moment


if __name__ == "__main__":
    main()
