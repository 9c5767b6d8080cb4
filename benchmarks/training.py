"""A training step of ours beside LAVIS's step, rewritten over `transformers`' modules as one would write it today.

    python benchmarks/training.py miniature|8x512 OUT [--rounds 3] [--steps 20] [--batch-size 64] [--threads 2]
        [--precision bf16] [--json FILE]
    python benchmarks/training.py miniature|8x512 OUT --check      # first losses of both, same images and texts

OUT gets the start of both sides: for `miniature` the bundled models, for `8x512` random ones of 8 layers of 512 (image
encoder at 224 pixels, Q-Former, OPT, the published vocabularies). Sides: "theirs"; "ours", which looks at each image
anew and augments it, as theirs does; "cached", with the image encoder's output kept on disk. Each sample is a process
of its own, and sides take turns. Printed: images a second over the second half of the steps, medians of the rounds.

Theirs is LAVIS's `blip2_qformer.py` and `blip2_opt.py` line by line where `transformers` has the part. Its stage 1
pads texts to 32 tokens. Three things differ: the Q-Former of `transformers` keeps no keys, so the text that is to be
generated stands in one row with the queries (the paper's Figure 2); contrast is within one process; and the token that
begins a caption is no target, so that the losses can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

STAGES = {1: "matching", 2: "generative"}
LOSSES = ("itc", "itm", "lm")
NUM_PICTURES = 128
SHAPE = {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "intermediate_size": 2048}
LARGER = {
    "vision": SHAPE | {"image_size": 224},
    "qformer": SHAPE | {"encoder_hidden_size": 512},
    "language": SHAPE | {"vocab_size": 50304},
}
WORDS = ("two", "dogs", "and", "a", "red", "car", "on", "green", "with", "three", "cats", "beside", "one")
RECIPE = """
stage = {stage}
start = "{start}"
out = "{out}"
precision = "{precision}"
threads = {threads}
log_every = {log_every}
evaluate_every = 1000000
checkpoint_every = 1000000

[data]
rows = "{rows}"
augment = {augment}
{features}

[optim]
steps = {steps}
batch_size = {batch_size}
warmup_steps = 1
peak_lr = 1e-4
min_lr = 1e-5
"""


def write_start(size: str, out: Path) -> None:
    """The models that both sides begin with, and images of which each has a caption of its own."""
    import torch
    from PIL import Image

    from blip2 import checkpoint
    from blip2.model import Blip2, Blip2Matcher

    for name, make in (("miniature", Blip2), ("miniature-itm", Blip2Matcher)):
        bundled = checkpoint.resolve(name)
        model = checkpoint.load(bundled, dtype=torch.float32)
        config = model.config
        if size == "8x512":
            torch.manual_seed(0)
            parts = {part: replace(getattr(config, part), **change) for part, change in LARGER.items()
                     if hasattr(config, part)}  # fmt: skip
            if make is Blip2Matcher:
                parts["qformer"] = replace(parts["qformer"], vocab_size=30523)
            model = make(replace(config, **parts)).eval()
        settings = replace(checkpoint.image_settings(bundled), size=model.config.vision.image_size)
        where = out / ("generative" if make is Blip2 else "matching")
        checkpoint.save(model, where, tokenizer=bundled / "tokenizer.json", settings=settings)
    chance = random.Random(0)
    with (out / "rows.jsonl").open("w") as rows:
        for number in range(NUM_PICTURES):
            colours = [tuple(chance.randrange(256) for _ in range(3)) for _ in range(2)]
            picture = Image.new("RGB", (320, 240), colours[0])
            picture.paste(colours[1], (40, 40, 42 + number // 2, 200))
            picture.save(out / f"{number:03}.jpg")
            caption = " ".join([*chance.choices(WORDS, k=8), WORDS[number % 13], WORDS[number // 13 % 13]])
            rows.write(json.dumps({"image": f"{number:03}.jpg", "captions": [caption]}) + "\n")


# ---- ours ------------------------------------------------------------------------------------------------------


def ours(stage: int, out: Path, options: argparse.Namespace, *, is_cached: bool) -> dict[str, float]:
    from blip2.train import run

    with tempfile.TemporaryDirectory(dir=out) as folder:
        text = RECIPE.format(
            stage=stage, start=out / STAGES[stage], out=Path(folder) / "run", precision=options.precision,
            threads=options.threads, rows=out / "rows.jsonl", steps=options.steps, batch_size=options.batch_size,
            log_every=1 if options.check else options.steps // 2,
            augment=str(not is_cached and not options.check).lower(),
            features=f'features = "{out}/features{stage}"' if is_cached else "",
        )  # fmt: skip
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(text)
        run(recipe)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").open()]
    steps = [line for line in lines if "images_per_s" in line]
    return steps[0] if options.check else {"images_per_s": steps[-1]["images_per_s"]}


# ---- theirs ----------------------------------------------------------------------------------------------------


def loader(out: Path, processor: Any, options: argparse.Namespace) -> Any:
    """LAVIS's ``blip2_image_train`` and its loader, in a worker process: random crop, flip, normalise."""
    import numpy as np
    import torch
    from PIL import Image

    size, mean, std = processor.size["height"], np.array(processor.image_mean), np.array(processor.image_std)
    rows = [json.loads(line) for line in (out / "rows.jsonl").open()]

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, number: int) -> tuple[Any, str]:
            picture = Image.open(out / rows[number]["image"]).convert("RGB")
            box = None
            if not options.check:  # RandomResizedCrop(scale=(0.5, 1.0)), RandomHorizontalFlip()
                area = picture.width * picture.height * random.uniform(0.5, 1.0)
                ratio = random.uniform(3 / 4, 4 / 3)
                width = min(picture.width, round((area * ratio) ** 0.5))
                height = min(picture.height, round((area / ratio) ** 0.5))
                left, top = random.randint(0, picture.width - width), random.randint(0, picture.height - height)
                box = (left, top, left + width, top + height)
            picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
            if not options.check and random.random() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            values = (np.asarray(picture, dtype=np.float32) / 255 - mean) / std
            return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1), rows[number]["captions"][0]

    def endless() -> Any:
        while True:
            yield from torch.utils.data.DataLoader(
                Pictures(), batch_size=options.batch_size, shuffle=not options.check, drop_last=True, num_workers=1
            )

    return endless()


def their_stage1(folder: Path) -> tuple[Any, Any]:
    """``Blip2Qformer.forward`` of LAVIS: contrast, matching with hard negatives, captioning."""
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file
    from torch import nn
    from transformers import AutoTokenizer, Blip2ForImageTextRetrieval

    model = Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="[PAD]")
    weights, width = load_file(folder / "model.safetensors"), model.config.qformer_config.hidden_size
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12))
    bias = nn.Parameter(weights["qformer_lm_head.bias"].float())
    named = {"0": "transform.dense", "2": "transform.LayerNorm"}
    head.load_state_dict({f"{place}.{kind}": weights[f"qformer_lm_head.{name}.{kind}"].float()
                          for place, name in named.items() for kind in ("weight", "bias")})  # fmt: skip
    model.temperature, model.lm_head, model.lm_bias = nn.Parameter(weights["temp"].float().reshape(())), head, bias
    words = model.embeddings.word_embeddings.weight
    bos, num_queries = model.config.qformer_bos_token_id, model.config.num_query_tokens
    for name, parameter in model.vision_model.named_parameters():
        parameter.requires_grad = name.startswith("post_layernorm")  # LAVIS's ln_vision

    def read(text_BT: Any, mask_BT: Any, image_BPD: Any = None) -> Any:
        queries = None if image_BPD is None else model.query_tokens.expand(len(text_BT), -1, -1)
        count = 0 if image_BPD is None else num_queries
        return model.qformer(
            query_embeds=model.embeddings(input_ids=text_BT, query_embeds=queries), query_length=count,
            attention_mask=mask_BT, encoder_hidden_states=image_BPD,
        ).last_hidden_state  # fmt: skip

    def step(pixels: Any, captions: list[str]) -> dict[str, Any]:
        found = tokenizer(list(captions), padding="max_length", truncation=True, max_length=32, return_tensors="pt")
        text_BT, mask_BT = found.input_ids, found.attention_mask
        image_BPD = model.vision_model(pixel_values=pixels).last_hidden_state
        size, ones = len(pixels), torch.ones(len(pixels), num_queries, dtype=torch.long)
        queries = model.query_tokens.expand(size, -1, -1)
        seen = model.qformer(query_embeds=queries, encoder_hidden_states=image_BPD).last_hidden_state
        images_BQE = F.normalize(model.vision_projection(seen), dim=-1)
        texts_BE = F.normalize(model.text_projection(read(text_BT, mask_BT)[:, 0]), dim=-1)
        cosines_BBQ = torch.einsum("iqe,te->itq", images_BQE, texts_BE)
        logits_BB = cosines_BBQ.max(dim=-1).values / model.temperature
        own = torch.arange(size)
        itc = sum(F.cross_entropy(each, own, label_smoothing=0.1) for each in (logits_BB, logits_BB.t())) / 2
        with torch.no_grad():
            to_text = F.softmax(logits_BB.float(), dim=1).fill_diagonal_(0) + 1e-4
            to_image = F.softmax(logits_BB.t().float(), dim=1).fill_diagonal_(0) + 1e-4
            wrong_image = torch.multinomial(to_image, 1)[:, 0]
            wrong_text = torch.multinomial(to_text, 1)[:, 0]
        texts = torch.cat([text_BT, text_BT, text_BT[wrong_text]])
        masks = torch.cat([mask_BT, mask_BT, mask_BT[wrong_text]])
        images = torch.cat([image_BPD, image_BPD[wrong_image], image_BPD])
        both = read(texts, torch.cat([ones.repeat(3, 1), masks], dim=1), images)
        logits = model.itm_head(both[:, :num_queries]).mean(dim=1)
        itm = F.cross_entropy(logits, torch.cat([torch.ones(size), torch.zeros(2 * size)]).long())
        written_BT = text_BT.clone()
        written_BT[:, 0] = bos
        total = num_queries + text_BT.shape[1]
        allowed = torch.ones(total, total, dtype=torch.bool).tril()
        allowed[:num_queries, :num_queries] = True
        keys = torch.cat([ones, mask_BT], dim=1).bool()
        allowed_B1SS = allowed[None, None] & keys[:, None, None]
        hidden = read(written_BT, allowed_B1SS, image_BPD)[:, num_queries:-1]
        scores = F.linear(head(hidden), words, bias)
        wanted = written_BT[:, 1:].masked_fill(mask_BT[:, 1:] == 0, -100)
        lm = F.cross_entropy(scores.flatten(0, 1).float(), wanted.flatten(), label_smoothing=0.1)
        return {"itc": itc, "itm": itm, "lm": lm}

    return model, step


def their_stage2(folder: Path) -> tuple[Any, Any]:
    """``Blip2OPT.forward`` of LAVIS: captions of a frozen OPT after the projected queries."""
    import torch
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="<pad>")
    model.language_model.requires_grad_(False)
    for name, parameter in model.vision_model.named_parameters():
        parameter.requires_grad = name.startswith("post_layernorm")

    def step(pixels: Any, captions: list[str]) -> dict[str, Any]:
        image_BPD = model.vision_model(pixel_values=pixels).last_hidden_state
        queries = model.query_tokens.expand(len(pixels), -1, -1)
        seen = model.qformer(query_embeds=queries, encoder_hidden_states=image_BPD).last_hidden_state
        read_BQD = model.language_projection(seen)
        found = tokenizer([f"{caption}\n" for caption in captions], padding="longest", truncation=True,
                          max_length=32, return_tensors="pt")  # fmt: skip
        wanted = found.input_ids.masked_fill(found.attention_mask == 0, -100)
        wanted[:, 0] = -100
        wanted = torch.cat([torch.full(read_BQD.shape[:2], -100), wanted], dim=1)
        embedded = model.language_model.get_input_embeddings()(found.input_ids)
        mask = torch.cat([torch.ones(read_BQD.shape[:2], dtype=torch.long), found.attention_mask], dim=1)
        answer = model.language_model(inputs_embeds=torch.cat([read_BQD, embedded], dim=1), attention_mask=mask,
                                      labels=wanted)  # fmt: skip
        return {"lm": answer.loss}

    return model, step


def theirs(stage: int, out: Path, options: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import AutoImageProcessor

    torch.set_num_threads(options.threads)
    folder = out / STAGES[stage]
    model, step = (their_stage1 if stage == 1 else their_stage2)(folder)
    model.train()
    for part in (model.vision_model, getattr(model, "language_model", None)):
        if part is not None:
            part.eval()  # the frozen parts have no dropout
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05)
    batches = loader(out, AutoImageProcessor.from_pretrained(folder), options)
    half = options.steps // 2
    began = 0.0
    for number in range(options.steps):
        if number == half:
            began = time.perf_counter()
        pixels, captions = next(batches)
        is_half = options.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16) if is_half else nullcontext():
            losses = step(pixels, captions)
        if options.check:
            return {name: loss.item() for name, loss in losses.items()}
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"images_per_s": (options.steps - half) * options.batch_size / (time.perf_counter() - began)}


# ---- both ------------------------------------------------------------------------------------------------------


def sample(side: str, stage: int, options: argparse.Namespace) -> dict[str, float]:
    """In a process of its own."""
    command = [sys.executable, __file__, options.size, str(options.out), "--side", side, "--stage", str(stage)]
    for name in ("steps", "batch_size", "threads", "precision"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--check"] if options.check else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{side}, stage {stage}: ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("miniature", "8x512"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--check", action="store_true", help="the losses of the first step, in fp32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("theirs", "ours", "cached"), help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.check:  # every image in one batch: whatever the order, the losses are the same
        options.batch_size, options.steps, options.precision = NUM_PICTURES, 1, "fp32"
    if options.side:
        if options.side == "theirs":
            found = theirs(options.stage, options.out, options)
        else:
            found = ours(options.stage, options.out, options, is_cached=options.side == "cached")
        print(json.dumps(found))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    write_start(options.size, options.out)
    results: dict[str, Any] = {}
    for stage in STAGES:
        if options.check:
            for side in ("theirs", "ours"):
                found = {name: value for name, value in sample(side, stage, options).items() if name in LOSSES}
                print(f"stage {stage}  {side:7}", "  ".join(f"{name} {value:.6f}" for name, value in found.items()))
            continue
        sides = ("theirs", "ours", "cached")
        rounds = [{side: sample(side, stage, options)["images_per_s"] for side in sides}
                  for _ in range(options.rounds)]  # fmt: skip
        medians = {side: statistics.median(each[side] for each in rounds) for side in sides}
        results[f"stage {stage}"] = {"rounds": rounds, "medians": medians}
        for side in sides:
            each = ", ".join(f"{found[side]:.1f}" for found in rounds)
            print(f"stage {stage}  {side:7} {medians[side]:8.1f} pictures/s, {medians[side] / medians['theirs']:.2f} "
                  f"times theirs  ({each})", flush=True)  # fmt: skip
    if options.json:
        settings = {name: getattr(options, name) for name in ("size", "batch_size", "threads", "precision")}
        options.json.write_text(json.dumps(settings | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
