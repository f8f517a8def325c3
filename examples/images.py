"""Image classification with a vision transformer, on a folder with one sub-folder per class.

python examples/images.py --model dinov2-small-focus --data IMAGES --steps 20 --out out/images
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from sample import model_folder
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import gradrank as gr


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dinov2-small-focus")
    parser.add_argument("--data", type=Path, required=True, help="folder of CLASS/*.jpg or *.png")
    parser.add_argument("--budget", default="uniform:4")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="out/images")
    args = parser.parse_args(argv)

    set_seed(0)
    files = sorted(file for file in args.data.glob("*/*") if file.suffix in {".jpg", ".png"})
    names = sorted({file.parent.name for file in files})
    folder = model_folder(args.model)
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(
        folder,
        id2label=dict(enumerate(names)),
        label2id={name: label for label, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # a new head
    )

    def collate(batch: list[Path]) -> dict[str, torch.Tensor]:
        pictures = [Image.open(file).convert("RGB") for file in batch]
        labels = torch.tensor([names.index(file.parent.name) for file in batch])
        return {**processor(pictures, return_tensors="pt"), "labels": labels}

    loader = DataLoader(files, batch_size=8, shuffle=True, collate_fn=collate)
    plan = gr.plan(model, loader, method="gard", budget=args.budget, num_batches=8)
    print(plan)

    # The new head is trained in full, and saved with the adapter.
    model = gr.apply(plan, model, lora_alpha=16, modules_to_save=["classifier"])
    arguments = TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    Trainer(model, arguments, train_dataset=files, data_collator=collate).train()
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
