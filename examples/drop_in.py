"""Fine-tune BLIP-2 as notebooks do it, with transformers' Trainer: the Q-Former learns, the rest is frozen by its name.

    python examples/drop_in.py blip2 FOLDER          # or: transformers FOLDER

The program is written for transformers; the first argument says whose classes it uses. Needs transformers and
accelerate. It prints the loss of each step, the loss of the evaluation, and the loss of the model that was saved.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

CAPTIONS = {"picture.png": "two dogs and a red car", "cats.png": "a cat on the left", "flowers.png": "flowers"}
LEARNING = ("qformer", "query_tokens", "language_projection")


def main(library: str, folder: str) -> list[float]:
    classes = importlib.import_module(library)
    processor = classes.Blip2Processor.from_pretrained(folder)
    model = classes.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(LEARNING)

    pictures = [Image.open(Path(__file__).parent / name).convert("RGB") for name in CAPTIONS]
    batch = processor(images=pictures, text=list(CAPTIONS.values()), padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[labels == model.config.image_token_index] = -100
    rows = [{name: values[row] for name, values in {**batch, "labels": labels}.items()} for row in range(len(pictures))]

    with tempfile.TemporaryDirectory() as out:
        options = TrainingArguments(
            out, max_steps=4, per_device_train_batch_size=3, learning_rate=1e-4, logging_steps=1, eval_strategy="steps",
            eval_steps=4, save_steps=4, prediction_loss_only=True, report_to=[], disable_tqdm=True,
            remove_unused_columns=False, use_cpu=True, seed=1,
        )  # fmt: skip
        trainer = Trainer(model=model, args=options, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        model.save_pretrained(f"{out}/done")
        again = classes.Blip2ForConditionalGeneration.from_pretrained(f"{out}/done")
        with torch.no_grad():
            loss = again.eval()(**batch, labels=labels).loss.item()
    log = trainer.state.log_history
    return [entry[key] for key in ("loss", "eval_loss") for entry in log if key in entry] + [loss]


if __name__ == "__main__":
    print(*main(*sys.argv[1:]), sep="\n")
