"""TRL's SFTTrainer: measure the base model, then hand over a LoraConfig.

python examples/trl_sft.py --model smollm2-135m --steps 20 --out out/trl-sft
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from sample import model_folder, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import gradrank as gr


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--budget", default="uniform:4")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--out", default="out/trl-sft")
    args = parser.parse_args(argv)

    set_seed(0)
    folder = model_folder(args.model)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = Dataset.from_list([{"text": text} for text in sentences(args.data)])
    settings = SFTConfig(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        max_length=48,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),  # TRL's own default is bf16 everywhere
    )

    # A trainer without an adapter makes the batches: the same template, masks and packing.
    plain = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    plan = gr.plan(model, plain.get_train_dataloader(), "gard", args.budget, num_batches=8)

    method = gr.DynamicGard(interval=args.interval, window=args.interval, energy=0.7)
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=plan.lora_config(lora_alpha=16, task_type="CAUSAL_LM"),
        callbacks=[gr.CapacityCallback(method, args.budget)],  # leave out for a static plan
    )
    gr.prepare_trainer(trainer)
    trainer.train()
    trainer.save_model(args.out)


if __name__ == "__main__":
    main()
