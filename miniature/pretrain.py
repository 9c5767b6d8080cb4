"""Make the miniature's stand-ins for the pre-trained parts: a small image encoder and a small language model.

BLIP-2 starts from an image encoder and a language model that others have trained (EVA-CLIP, OPT, Flan-T5).
Nothing of that kind exists for the picture world, so both are made here from scratch, and then frozen:

- the **image encoder** is a vision transformer of CLIP's make, trained with labels that the world knows: each
  patch tells what object it shows, how many of its kind there are and where they stand; the class token tells
  the background and the count of every kind;
- the **language model** is a small OPT, trained on text alone: a description of a scene, then captions,
  questions and dialogues about it. It never sees a picture.

    python -m miniature.pretrain vision   --data DIR --out vision.pt   --steps 3000
    python -m miniature.pretrain language --out language.pt --steps 5000

Both only know training scenes: pairs of kinds that are kept for the test occur in neither. Both print their
accuracy on pairs that they have never seen, write a checkpoint now and then, and go on from it when started again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from blip2.config import CLIP_MEAN, CLIP_STD, OPTConfig, VisionConfig
from blip2.image import load_image, to_pixels
from blip2.language.opt import OPT
from blip2.vision import VisionTransformer
from miniature import texts, world

VISION = VisionConfig(hidden_size=192, num_layers=6, num_heads=3, intermediate_size=768, image_size=112)
LANGUAGE = OPTConfig(
    vocab_size=1024, hidden_size=192, num_layers=4, num_heads=6, intermediate_size=768,
    max_position_embeddings=512, eos_token_id=-1,
)  # fmt: skip
KINDS = list(texts.KINDS)
BACKGROUNDS = list(world.BACKGROUNDS)
SIDES = (None, "left", "right")
HEIGHTS = (None, "top", "bottom")


# ------------------------------------------------------------------------------------------------- training


def train(
    model: nn.Module, batches: Iterator[Tensor], losses, *, steps: int, peak: float, checkpoint: Path, evaluate
) -> None:
    """AdamW, linear warm-up, cosine to a fiftieth; a progress line; a checkpoint that a second start goes on from."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"going on from step {first} of {checkpoint}", flush=True)
    started, running = time.time(), defaultdict(float)
    for step in range(first, steps):
        rate = min((step + 1) / 200, 0.51 + 0.49 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        with torch.autocast("cpu", torch.bfloat16):
            named = losses(model, next(batches))
        optimizer.zero_grad()
        sum(named.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, loss in named.items():
            running[name] += loss.item() / 50
        if (step + 1) % 50 == 0:
            pace = (time.time() - started) / (step + 1 - first)
            text = "  ".join(f"{name} {value:.3f}" for name, value in running.items())
            left = pace * (steps - step - 1) / 60
            print(f"step {step + 1}/{steps}  {text}  {pace:.2f} s a step, {left:.0f} min left", flush=True)
            running.clear()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            model.eval()
            print(json.dumps(evaluate(model)), flush=True)
            model.train()


# --------------------------------------------------------------------------------------------------- vision


class DenseHeads(nn.Module):
    """The image encoder with the heads that teach it; only the encoder is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = VisionTransformer(VISION)
        self.patch = nn.Linear(VISION.hidden_size, len(KINDS) + 1 + 4 + len(SIDES) + len(HEIGHTS))
        self.scene = nn.Linear(VISION.hidden_size, len(BACKGROUNDS) + 5 * len(KINDS))

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        encoded_BPD = self.encoder(pixels_BCHW)
        return self.patch(encoded_BPD[:, 1:]), self.scene(encoded_BPD[:, 0])


def patch_labels(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """What a row's patches and its whole scene are to say.

    Patches ``uint8[P, 4]``: kind (0: none), count - 1, side, height. Scene ``uint8[1 + K]``: background, counts.
    """
    grid = VISION.image_size // VISION.patch_size
    centres = (np.arange(grid) + 0.5) / grid
    patches = np.zeros((grid, grid, 4), np.uint8)
    scene = np.zeros(1 + len(KINDS), np.uint8)
    scene[0] = BACKGROUNDS.index(row["background"])
    boxes = defaultdict(list)
    for thing in row["objects"]:
        x0, y0, x1, y1 = thing["box"]
        boxes[thing["kind"]].append((x0 / row["width"], y0 / row["height"], x1 / row["width"], y1 / row["height"]))
    for kind, places in boxes.items():
        xs = [(x0 + x1) / 2 for x0, _, x1, _ in places]
        ys = [(y0 + y1) / 2 for _, y0, _, y1 in places]
        side = 1 if max(xs) < 0.45 else 2 if min(xs) > 0.55 else 0
        height = 1 if max(ys) < 0.45 else 2 if min(ys) > 0.55 else 0
        scene[1 + KINDS.index(kind)] = len(places)
        for x0, y0, x1, y1 in places:
            inside = np.ix_((centres > y0) & (centres < y1), (centres > x0) & (centres < x1))
            patches[inside] = (KINDS.index(kind) + 1, len(places) - 1, side, height)
    return patches.reshape(-1, 4), scene


def load_small(path: str) -> np.ndarray:
    """A picture as the model's processor makes it, in 8 bits: ``uint8[3, size, size]``."""
    pixels = to_pixels([load_image(path)], size=VISION.image_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return (pixels[0] * 255).round().to(torch.uint8).numpy()


def load_pictures(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pictures of a folder and their labels, kept beside them for the next start."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").open()]
    cache = folder / f"pixels-{VISION.image_size}.npy"
    if not cache.exists():
        pixels = np.lib.format.open_memmap(
            cache.with_suffix(".tmp"), "w+", np.uint8, (len(rows), 3, VISION.image_size, VISION.image_size)
        )
        with ProcessPoolExecutor(2) as pool:
            paths = (str(folder / row["image"]) for row in rows)
            for index, picture in enumerate(pool.map(load_small, paths, chunksize=256)):
                pixels[index] = picture
        pixels.flush()
        os.replace(cache.with_suffix(".tmp"), cache)
    patches, scenes = zip(*map(patch_labels, rows), strict=True)
    return np.load(cache, mmap_mode="r"), np.stack(patches), np.stack(scenes)


def normalized(pixels: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def vision_losses(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    pixels, patches, scenes = batch
    patch_logits, scene_logits = model(pixels)
    kind, count, side, height = patch_logits.float().split([len(KINDS) + 1, 4, len(SIDES), len(HEIGHTS)], dim=-1)
    shown = patches[..., 0] > 0
    background, counts = scene_logits.float().split([len(BACKGROUNDS), 5 * len(KINDS)], dim=-1)
    return {
        "kind": F.cross_entropy(kind.flatten(0, 1), patches[..., 0].flatten()),
        "count": F.cross_entropy(count[shown], patches[..., 1][shown]),
        "side": F.cross_entropy(side[shown], patches[..., 2][shown]),
        "height": F.cross_entropy(height[shown], patches[..., 3][shown]),
        "background": F.cross_entropy(background, scenes[:, 0]),
        "scene": 3 * F.cross_entropy(counts.unflatten(1, (-1, 5)).flatten(0, 1), scenes[:, 1:].flatten()),
    }


@torch.no_grad()
def vision_accuracy(model: nn.Module, pictures: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, float]:
    """On pictures with unseen pairs: patches, and the counts of the kinds that are there."""
    right: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(pictures[0]), 200):
        pixels, patches, scenes = (part[start : start + 200] for part in pictures)
        patch_logits, scene_logits = model(normalized(pixels))
        wanted = torch.from_numpy(patches).long()
        shown = wanted[..., 0] > 0
        parts = patch_logits.split([len(KINDS) + 1, 4, len(SIDES), len(HEIGHTS)], dim=-1)
        for index, name in enumerate(("kind", "count", "side", "height")):
            right[name] += (parts[index].argmax(-1) == wanted[..., index])[shown].float().tolist()
        counts = scene_logits[:, len(BACKGROUNDS) :].unflatten(1, (-1, 5)).argmax(-1)
        wanted_counts = torch.from_numpy(scenes[:, 1:]).long()
        there = wanted_counts > 0
        right["scene counts"] += (counts == wanted_counts)[there].float().tolist()
        right["whole scene"] += (counts == wanted_counts).all(1).float().tolist()
        right["background"] += (
            (scene_logits[:, : len(BACKGROUNDS)].argmax(-1) == torch.from_numpy(scenes[:, 0]).long()).float().tolist()
        )
    return {name: round(float(np.mean(values)), 4) for name, values in right.items()}


def train_vision(data: Path, test: Path, out: Path, steps: int, batch_size: int) -> None:
    pictures, unseen = load_pictures(data), load_pictures(test)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        shuffle = np.random.default_rng(0)
        while True:
            order = shuffle.permutation(len(pictures[0]))
            for start in range(0, len(order) - batch_size + 1, batch_size):
                pixels, patches, scenes = (part[np.sort(order[start : start + batch_size])] for part in pictures)
                yield normalized(pixels), torch.from_numpy(patches).long(), torch.from_numpy(scenes).long()

    train(
        DenseHeads(), batches(), vision_losses, steps=steps, peak=1e-3, checkpoint=out,
        evaluate=lambda model: vision_accuracy(model, unseen),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- language

NEWLINE = "\n"


def segments(seed: int, split: str) -> list[tuple[str, float]]:
    """One text document as pieces with their weight in the loss: a description, then what is said about it.

    Answers weigh most. What cannot be known (which question comes next) weighs little, and whether a dialogue
    goes on after an answer weighs nothing, so that the model learns to stop there.
    """
    chance = random.Random(f"document {split} {seed}")
    scene = world.make_scene(seed, split)
    pieces = [(texts.description(scene, chance), 0.3), ("</s>", 0.0)]
    if chance.random() < 0.4:
        pieces += [(chance.choice(texts.captions(scene, chance)), 1.0), (NEWLINE, 1.0)]
    questions, dialogues = texts.questions(scene, chance), texts.dialogues(scene, chance)
    chance.shuffle(questions)
    turns = [[question] for question in questions[: chance.randint(4, 7)]]
    turns += chance.sample(dialogues, min(2, len(dialogues)))
    chance.shuffle(turns)
    for dialogue in turns:
        for index, turn in enumerate(dialogue):
            pieces.append((" Question:" if index else "Question:", 0.0))
            pieces += [(f" {turn.question}", 0.1), (" Answer:", 0.1), (f" {turn.answer}", 1.0)]
            pieces.append((".", 0.0) if index + 1 < len(dialogue) else (NEWLINE, 1.0))
    return pieces


def make_tokenizer(num_documents: int = 8000) -> Tokenizer:
    """Byte-level BPE with OPT's special tokens in OPT's places; the newline that ends an answer is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LANGUAGE.vocab_size - 8,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = ("".join(text for text, _ in segments(seed, "train")) for seed in range(num_documents))
    tokenizer.train_from_iterator((document.replace("</s>", "") for document in documents), trainer)
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return tokenizer


def document_tokens(tokenizer: Tokenizer, seed: int, split: str) -> tuple[list[int], list[float], int]:
    """Token ids, the weight of each as a target, and where the description ends."""
    tokens: list[int] = []
    weights: list[float] = []
    pieces = segments(seed, split)
    for text, weight in pieces:
        ids = [2] if text == "</s>" else tokenizer.encode(text, add_special_tokens=False).ids
        tokens += ids
        weights += [weight] * len(ids)
    return tokens, weights, tokens.index(2)


def language_documents(tokenizer: Tokenizer, first: int, count: int, split: str) -> list[tuple]:
    work = [(tokenizer.to_str(), start, min(2000, count), split) for start in range(first, first + count, 2000)]
    with ProcessPoolExecutor(2) as pool:
        return [document for part in pool.map(_documents, work) for document in part]


def _documents(work: tuple[str, int, int, str]) -> list[tuple]:
    tokenizer = Tokenizer.from_str(work[0])
    return [document_tokens(tokenizer, seed, work[3]) for seed in range(work[1], work[1] + work[2])]


def new_language_model(config: OPTConfig) -> OPT:
    """An OPT that learns to look things up early: positions start out sinusoidal, logits start out small."""
    model = OPT(config)
    width = config.hidden_size
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=width**-0.5 if "blocks" in name else 0.4)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    positions = torch.arange(model.position_embedding.num_embeddings)[:, None]
    angles = positions / 10000 ** (torch.arange(0, width, 2) / width)
    model.position_embedding.weight.data = 0.3 * torch.cat([angles.sin(), angles.cos()], dim=1)
    nn.init.constant_(model.final_norm.weight, width**-0.5)
    return model


def language_losses(model: OPT, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    tokens_BT, weights_BT, description_BT = batch
    embeddings_BTD = model.embed(tokens_BT)
    if model.training:
        # A soft prompt never falls exactly on words, so the descriptions do not either.
        strength_B11 = 0.3 * torch.rand(len(tokens_BT), 1, 1) * 0.4
        embeddings_BTD = embeddings_BTD + torch.randn_like(embeddings_BTD) * strength_B11 * description_BT[:, :, None]
    logits_BTV = model.logits(model(embeddings_BTD[:, :-1])).float()
    loss_BT = F.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT[:, 1:], reduction="none")
    weights_BT = weights_BT[:, 1:]
    return {"lm": (loss_BT * weights_BT).sum() / weights_BT.sum()}


def collate(documents: list[tuple]) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(document[0]) for document in documents)
    tokens = torch.full((len(documents), length), LANGUAGE.pad_token_id)
    weights = torch.zeros(len(documents), length)
    description = torch.zeros(len(documents), length)
    for row, (ids, values, end) in enumerate(documents):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = torch.tensor(values)
        description[row, :end] = 1
    return tokens, weights, description


@torch.no_grad()
def language_accuracy(model: OPT, tokenizer: Tokenizer, split: str, count: int = 150) -> dict[str, float]:
    """Questions about described scenes, each asked on its own: the share of answers right to the letter, by type."""
    end = tokenizer.encode(NEWLINE, add_special_tokens=False).ids[0]
    asked: list[tuple[str, list[int], str]] = []
    for seed in range(10_000_000, 10_000_000 + count):
        chance = random.Random(seed)
        scene = world.make_scene(seed, split)
        prefix = tokenizer.encode(texts.description(scene, chance), add_special_tokens=False).ids + [2]
        dialogues = [[question] for question in texts.questions(scene, chance)] + texts.dialogues(scene, chance)
        for dialogue in dialogues:
            history = ""
            for turn in dialogue:
                history += f"Question: {turn.question} Answer:"
                asked.append(
                    (turn.type, prefix + tokenizer.encode(history, add_special_tokens=False).ids, turn.answer)
                )
                history += f" {turn.answer}. "
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(asked), 200):
        part = asked[start : start + 200]
        lengths = torch.tensor([len(ids) for _, ids, _ in part])
        prompts = torch.full((len(part), int(lengths.max())), LANGUAGE.pad_token_id)
        for row, (_, ids, _) in enumerate(part):
            prompts[row, : len(ids)] = torch.tensor(ids)
        logits, cache = model.prefill(model.embed(prompts), lengths, 20)
        answers = [logits.argmax(-1)]
        for _ in range(19):
            answers.append(model.step(answers[-1], cache).argmax(-1))
        for (kind, _, wanted), ids in zip(part, torch.stack(answers, 1).tolist(), strict=True):
            ids = ids[: ids.index(end)] if end in ids else ids
            said = tokenizer.decode(ids).strip()
            right[kind].append(sorted(said.split()) == sorted(wanted.split()) if kind == "list" else said == wanted)
    return {kind: round(float(np.mean(values)), 4) for kind, values in sorted(right.items())}


def train_language(out: Path, steps: int, batch_size: int, num_documents: int) -> None:
    path = out.with_name("tokenizer.json")
    if not path.exists():
        make_tokenizer().save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    documents = language_documents(tokenizer, 0, num_documents, "train")
    print(f"{num_documents} documents of {np.mean([len(d[0]) for d in documents]):.0f} tokens", flush=True)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        chance = random.Random(0)
        while True:
            pool = sorted(chance.sample(documents, batch_size * 32), key=lambda document: len(document[0]))
            parts = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
            chance.shuffle(parts)  # rows of like length together, so that little is padding
            yield from map(collate, parts)

    train(
        new_language_model(LANGUAGE), batches(), language_losses, steps=steps, peak=1.5e-3, checkpoint=out,
        evaluate=lambda model: language_accuracy(model, tokenizer, "test"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("vision", "language"))
    parser.add_argument("--data", type=Path, help="training pictures, written by miniature.world")
    parser.add_argument("--test", type=Path, help="test pictures, written by miniature.world")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.part == "vision":
        train_vision(options.data, options.test, options.out, options.steps, options.batch_size or 128)
    else:
        train_language(options.out, options.steps, options.batch_size or 48, options.documents)


if __name__ == "__main__":
    main()
