"""The miniature's language model: a small OPT that learns from text alone, and the tokenizers."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from blip2.config import OPTConfig
from blip2.language.opt import OPT
from miniature import texts, world
from miniature.schedule import train

LANGUAGE = OPTConfig(
    vocab_size=1024, hidden_size=192, num_layers=4, num_heads=6, intermediate_size=768,
    max_position_embeddings=512, eos_token_id=202, pad_token_id=1, bos_token_id=2,
)  # fmt: skip

NEWLINE = "\n"


MakeScene = Callable[[int, str], Any]
"""A scene of a seed and a split, with what `texts` asks of one."""


def segments(
    seed: int, split: str, make_scene: MakeScene = world.make_scene, as_typed: float = 0.0
) -> list[tuple[str, float]]:
    """One text document as pieces with their weight in the loss: a description, then what is said about it.

    ``as_typed``: how often a question stands there as people also type it. Answers weigh most. What cannot be known
    (which question comes next) weighs little, and whether a dialogue goes on after an answer weighs nothing, so that
    the model learns to stop there.
    """
    chance = random.Random(f"document {split} {seed}")
    scene = make_scene(seed, split)
    pieces = [(texts.description(scene, chance), 0.3), ("</s>", 0.0)]
    if chance.random() < 0.7:
        pieces += [(chance.choice(texts.captions(scene, chance)), 1.0), (NEWLINE, 1.0)]
    turns = [[question] for question in texts.sample_questions(scene, chance, chance.randint(4, 7))]
    dialogues = texts.dialogues(scene, chance)
    turns += chance.sample(dialogues, min(2, len(dialogues)))
    chance.shuffle(turns)
    for dialogue in turns:
        for index, turn in enumerate(dialogue):
            pieces.append((" Question:" if index else "Question:", 0.0))
            question = turn.question
            if as_typed and chance.random() < as_typed:
                question = texts.as_typed(question, chance)
            pieces += [(f" {question}", 0.1), (" Answer:", 0.1), (f" {turn.answer}", 1.0)]
            pieces.append((".", 0.0) if index + 1 < len(dialogue) else (NEWLINE, 1.0))
    return pieces


def make_tokenizer(
    num_documents: int = 8000, vocab_size: int = LANGUAGE.vocab_size, make_scene: MakeScene = world.make_scene
) -> Tokenizer:
    """Byte-level BPE with OPT's special tokens in OPT's places; the newline that ends an answer is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 8,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = ("".join(text for text, _ in segments(seed, "train", make_scene)) for seed in range(num_documents))
    tokenizer.train_from_iterator((document.replace("</s>", "") for document in documents), trainer)
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return tokenizer


def document_tokens(
    tokenizer: Tokenizer, seed: int, split: str, make_scene: MakeScene = world.make_scene, as_typed: float = 0.0
) -> tuple[list[int], list[float], int]:
    """Token ids, the weight of each as a target, and where the description ends."""
    tokens: list[int] = []
    weights: list[float] = []
    pieces = segments(seed, split, make_scene, as_typed)
    for text, weight in pieces:
        ids = [2] if text == "</s>" else tokenizer.encode(text, add_special_tokens=False).ids
        tokens += ids
        weights += [weight] * len(ids)
    return tokens, weights, tokens.index(2)


def language_documents(
    tokenizer: Tokenizer,
    first: int,
    count: int,
    split: str,
    make_scene: MakeScene = world.make_scene,
    as_typed: float = 0.0,
) -> list[tuple]:
    starts = range(first, first + count, 2000)
    work = [(tokenizer.to_str(), start, min(2000, count), split, make_scene, as_typed) for start in starts]
    with ProcessPoolExecutor(2) as pool:
        return [document for part in pool.map(_documents, work) for document in part]


def _documents(work: tuple[str, int, int, str, MakeScene, float]) -> list[tuple]:
    text, first, count, split, make_scene, as_typed = work
    tokenizer = Tokenizer.from_str(text)
    return [document_tokens(tokenizer, seed, split, make_scene, as_typed) for seed in range(first, first + count)]


def new_language_model(config: OPTConfig) -> OPT:
    """An OPT that starts out able to look at the tokens just before, and whose logits start out small.

    All these texts need is look-up ("the number before this noun"), which a small model finds late, and suddenly,
    when it has to discover "the token before" first. So positions start out sinusoidal, in dimensions of which some
    are kept free of words, and four heads of the first block start out attending one to four tokens back.
    """
    model = OPT(config)
    width, head_size = config.hidden_size, config.hidden_size // config.num_heads
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=width**-0.5 if "blocks" in name else 0.4)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.constant_(model.final_norm.weight, width**-0.5)

    frequencies = torch.pi * 10000 ** (-torch.arange(width // 2) / (width // 2))
    angles = torch.arange(model.position_embedding.num_embeddings)[:, None] * frequencies
    model.position_embedding.weight.data = 0.3 * torch.cat([angles.sin(), angles.cos()], dim=1)
    pairs = head_size // 2
    sines, cosines = torch.arange(pairs), width // 2 + torch.arange(pairs)
    model.token_embedding.weight.data[:, torch.cat([sines, cosines])] = 0
    query, key, _ = model.blocks[0].qkv.weight.data.chunk(3)
    for head in range(4):
        start = head * head_size
        sine_rows, cosine_rows = start + torch.arange(pairs), start + pairs + torch.arange(pairs)
        query[start : start + head_size] = key[start : start + head_size] = 0
        # The scores are sums of cos(frequency * (own position - steps back - other position)).
        back = frequencies[:pairs] * (head + 1)
        key[sine_rows, sines] = key[cosine_rows, cosines] = 2.0
        query[sine_rows, sines] = query[cosine_rows, cosines] = 2.0 * back.cos()
        query[sine_rows, cosines], query[cosine_rows, sines] = -2.0 * back.sin(), 2.0 * back.sin()
    return model


def language_losses(model: OPT, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    tokens_BT, weights_BT, description_BT = batch
    embeddings_BTD = model.embed(tokens_BT)
    if model.training:
        # A soft prompt never falls exactly on words, so the descriptions do not either: noise of up to 0.3 of the
        # embeddings' own deviation, which starts out as 0.4.
        strength_B11 = 0.3 * 0.4 * torch.rand(len(tokens_BT), 1, 1)
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
def language_accuracy(
    model: OPT, tokenizer: Tokenizer, split: str, count: int = 150, make_scene: MakeScene = world.make_scene
) -> dict[str, float]:
    """Questions about described scenes, each asked on its own: the share of answers right to the letter, by type."""
    end = tokenizer.encode(NEWLINE, add_special_tokens=False).ids[0]
    asked: list[tuple[str, list[int], str]] = []
    for seed in range(10_000_000, 10_000_000 + count):
        chance = random.Random(seed)
        scene = make_scene(seed, split)
        prefix = tokenizer.encode(texts.description(scene, chance), add_special_tokens=False).ids + [2]
        dialogues = [[question] for question in texts.questions(scene, chance)] + texts.dialogues(scene, chance)
        for dialogue in dialogues:
            history = ""
            for turn in dialogue:
                history += f"Question: {turn.question} Answer:"
                asked.append((turn.type, prefix + tokenizer.encode(history, add_special_tokens=False).ids, turn.answer))
                history += f" {turn.answer}. "
    nouns = {noun: name for name, kind in scene.kinds.items() for noun in (kind.singular, kind.plural)}
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
            is_list = kind in ("list", "where")  # in any order
            pair = [texts.read_caption(text, nouns) for text in (said, wanted)]
            right[kind].append(pair[0] == pair[1] if is_list else said == wanted)
    return {kind: round(float(np.mean(values)), 4) for kind, values in sorted(right.items())}


def train_language(
    out: Path,
    steps: int,
    batch_size: int,
    num_documents: int,
    vocab_size: int = LANGUAGE.vocab_size,
    new_model: Callable[[Tokenizer], OPT] = lambda tokenizer: new_language_model(LANGUAGE),
    make_scene: MakeScene = world.make_scene,
    test_split: str = "test",
    *,
    first: int = 0,
    as_typed: float = 0.0,
    peak: float = 1.5e-3,
) -> None:
    """To ``out``, with tokenizer.json beside it. ``first``: the seed of the first document."""
    path = out.with_name("tokenizer.json")
    if not path.exists():
        make_tokenizer(vocab_size=vocab_size, make_scene=make_scene).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    documents = language_documents(tokenizer, first, num_documents, "train", make_scene, as_typed)
    print(f"{num_documents} documents of {np.mean([len(d[0]) for d in documents]):.0f} tokens", flush=True)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        chance = random.Random(0)
        while True:
            pool = sorted(chance.sample(documents, batch_size * 32), key=lambda document: len(document[0]))
            parts = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
            chance.shuffle(parts)  # rows of like length together, so that little is padding
            yield from map(collate, parts)

    train(
        new_model(tokenizer), batches(), language_losses, steps=steps, peak=peak, checkpoint=out,
        evaluate=lambda model: language_accuracy(model, tokenizer, test_split, make_scene=make_scene),
    )  # fmt: skip


def make_matching_tokenizer(
    num_documents: int = 8000, vocab_size: int = 400, make_scene: MakeScene = world.make_scene
) -> Tokenizer:
    """WordPiece as BERT has it, for the Q-Former's text branch; the last word is [DEC], which starts a caption."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    documents = ("".join(text for text, _ in segments(seed, "train", make_scene)) for seed in range(num_documents))
    tokenizer.train_from_iterator((document.replace("</s>", "") for document in documents), trainer)
    tokenizer.add_special_tokens(["[DEC]"])
    cls, sep = (("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]")))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[cls, sep])
    return tokenizer
