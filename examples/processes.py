"""accelerate with several processes: one plan from all data, ranks that move at fixed shapes.

accelerate launch --num_processes 2 examples/processes.py --steps 20 --out out/processes
(--cpu: with gloo on the CPU)
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
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
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--out", default="out/processes")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args(argv)

    accelerator = Accelerator(cpu=args.cpu)
    set_seed(0)
    with accelerator.main_process_first():  # one process fetches, the others read
        folder = model_folder(args.model)
        texts = sentences(args.data)
    model = AutoModelForCausalLM.from_pretrained(folder).to(accelerator.device)
    rows = token_rows(AutoTokenizer.from_pretrained(folder), texts)
    loader = accelerator.prepare(
        DataLoader(rows, batch_size=4, shuffle=True, collate_fn=default_data_collator)
    )

    # Every process measures its own batches; all get the same plan.
    plan = gr.plan(model, loader, method="gard", budget=args.budget, num_batches=4)
    accelerator.print(plan)
    model = get_peft_model(model, plan.lora_config(lora_alpha=16, task_type="CAUSAL_LM"))

    # Before the optimizer and the wrapping: the largest rank each layer may reach, behind a mask.
    method = gr.DynamicGard(interval=args.interval, window=args.interval, energy=0.7)
    gr.reserve(model, method, args.budget)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(weights, lr=2e-3))
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    with gr.Controller(model, optimizer, method, args.budget, args.steps) as controller:
        for step, batch in enumerate(itertools.islice(epochs, args.steps), start=1):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            accelerator.print(f"step {step} loss {loss.item():.3f}")

    model = accelerator.unwrap_model(model)
    gr.settle(model)  # real shapes again
    if accelerator.is_main_process:
        model.save_pretrained(args.out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
