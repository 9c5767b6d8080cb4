"""The parts of the second miniature: a small OPT with more words, and what the two stages start from.

    python -m miniature.photographs.parts matching --packages DIR --out WORK     (WORK/start-matching)
    python -m miniature.photographs.parts language --packages DIR --out WORK     (WORK/language.pt, tokenizer.json)
    python -m miniature.photographs.parts generative --packages DIR --out WORK   (WORK/start-generative)

The language model begins from the bundled miniature's, whose layers look words up in a description already, and
learns the nouns, from text alone. The Q-Former begins by chance: the bundled one has words for 24 kinds, and what its
[CLS] says of this world's 168 has hardly 8 dimensions (README, "What the Q-Former begins from"). The image encoder is
EfficientNet-Lite0 as it was published, of which the Q-Former sees the last grid, 7 x 7 places; all of a picture becomes
the square that is seen.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from blip2 import checkpoint
from blip2.checkpoint import ImageSettings, load_encoder
from blip2.checkpoint.convolutions import lite_file
from blip2.checkpoint.pickled import unpickled
from blip2.config import Blip2Config, MatcherConfig
from blip2.language.opt import OPT
from blip2.model import Blip2, Blip2Matcher, Vision
from blip2.qformer import QFormer
from miniature.language import LANGUAGE, make_matching_tokenizer, new_language_model, train_language
from miniature.photographs.packages import ENCODER
from miniature.photographs.world import PACKAGES, make_scene
from miniature.pretrain import QFORMER

VOCAB_SIZE, MATCHING_VOCAB_SIZE = 1536, 1000
LAYER = "last"
STD = 0.02 * math.sqrt(768 / QFORMER.hidden_size)
"""BERT's 0.02 is for a width of 768. What a layer adds to its input grows with it and with the root of the width."""
VALUE_SCALE = 0.7
"""About the deviation that values of directions by chance (0.02 for each of 1280 channels) have."""


def image_encoder(packages: Path) -> tuple[Vision, ImageSettings]:
    """EfficientNet-Lite0 with the position of each patch, which its features lack, and their mean as a class token."""
    vision, settings = load_encoder(packages / ENCODER, layer=LAYER, whole_picture=True)
    vision.config = replace(vision.config, has_positions=True)
    return vision, settings


def from_miniature(tokenizer: Tokenizer) -> OPT:
    """The bundled language model with another vocabulary: what both have is kept, a new word begins like one of the
    old ones, by chance."""
    folder = checkpoint.resolve("miniature")
    begun = checkpoint.load(folder, dtype=torch.float32).language
    model = new_language_model(replace(LANGUAGE, vocab_size=VOCAB_SIZE))
    state = begun.state_dict()
    old_VD = state.pop("token_embedding.weight")
    model.load_state_dict(state, strict=False)
    old = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    words = [number for word, number in old.items() if word.startswith("\u0120") and len(word) > 3]
    chance = torch.Generator().manual_seed(0)
    table_VD = model.token_embedding.weight.data
    drawn = torch.randint(len(words), (len(table_VD),), generator=chance)
    noise_VD = torch.randn(table_VD.shape, generator=chance) * old_VD[words].std(dim=0)
    table_VD.copy_(old_VD[torch.tensor(words)[drawn]] * 0.5 + noise_VD * 0.75)
    for word, number in tokenizer.get_vocab().items():
        if word in old:
            table_VD[number] = old_VD[old[word]]
    return model


@torch.no_grad()
def begin(qformer: QFormer, packages: Path) -> None:
    """Weights by chance, but for the values of cross-attention: from the first layer to the last they are the principal
    directions of the classifier that the image encoder was published with, each layer the next ones. A direction by
    chance would mix them with what no class differs in."""
    qformer.reset_parameters(std=STD)
    file = lite_file(packages / ENCODER)
    assert file is not None
    weight_CD = unpickled(file)["_fc.weight"].float()
    directions_DD = torch.linalg.svd(weight_CD - weight_CD.mean(dim=0)).Vh
    first = 0
    for layer in qformer.layers:
        if (attention := layer.cross_attention) is not None:
            width = len(attention.value.weight)
            attention.value.weight.copy_(directions_DD[first : first + width] * VALUE_SCALE)
            first += width


def start_matching(packages: Path, folder: Path) -> None:
    """``start-matching`` in ``folder``, with a Q-Former that has seen and read nothing."""
    vision, settings = image_encoder(packages)
    words = make_matching_tokenizer(vocab_size=MATCHING_VOCAB_SIZE, make_scene=make_scene)
    qformer = replace(
        QFORMER, encoder_hidden_size=vision.config.hidden_size, vocab_size=words.get_vocab_size(), has_text=True
    )
    config = MatcherConfig(vision.config, qformer, projection_size=128, bos_token_id=words.token_to_id("[DEC]"))
    model = Blip2Matcher(config)
    begin(model.qformer, packages)
    model.vision = vision
    checkpoint.save(model, folder / "start-matching", tokenizer=words.to_str(), settings=settings)


def start_generative(packages: Path, folder: Path) -> None:
    """``start-generative`` in ``folder``, with the language model of language.pt and a Q-Former that knows nothing: the
    recipes of stage 2 name another one to begin from."""
    vision, settings = image_encoder(packages)
    language = OPT(replace(LANGUAGE, vocab_size=VOCAB_SIZE))
    language.load_state_dict(torch.load(folder / "language.pt", weights_only=True)["model"])
    path = folder / "tokenizer.json"
    qformer = replace(QFORMER, encoder_hidden_size=vision.config.hidden_size)
    image_token = Tokenizer.from_file(str(path)).token_to_id("<image>")
    model = Blip2(Blip2Config(vision.config, qformer, language.config, image_token_id=image_token))
    model.vision, model.language = vision, language
    checkpoint.save(model, folder / "start-generative", tokenizer=path, settings=settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("matching", "language", "generative"))
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--documents", type=int, default=12_000)
    options = parser.parse_args()
    os.environ[PACKAGES] = str(options.packages)
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part != "language":
        (start_matching if options.part == "matching" else start_generative)(options.packages, options.out)
        return
    train_language(
        options.out / "language.pt",
        options.steps,
        options.batch_size,
        options.documents,
        VOCAB_SIZE,
        from_miniature,
        make_scene,
        test_split="pairs",
    )


if __name__ == "__main__":
    main()
