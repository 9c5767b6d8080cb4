"""Make the miniature's stand-ins for the pre-trained parts: a small image encoder and a small language model.

BLIP-2 starts from an image encoder and a language model that others have trained (EVA-CLIP, OPT, Flan-T5).
Nothing of that kind exists for the miniature world, so both are made here from scratch, and then frozen:

- the **image encoder** is a vision transformer of CLIP's make, trained with labels that the world knows: each
  patch tells what object it shows, how many of its kind there are and where they stand; the class token tells
  the background and the count of every kind;
- the **language model** is a small OPT, trained on text alone: a description of a scene, then captions,
  questions and dialogues about it. It never sees an image.

    python -m miniature.pretrain vision   --data DIR --test DIR --out vision-first.pt
    python -m miniature.pretrain vision   --data DIR MORE --test DIR --start vision-first.pt --out vision.pt
    python -m miniature.pretrain language --out language.pt
    python -m miniature.pretrain assemble --out DIR    (the folder of vision.pt, language.pt and tokenizer.json)
    python -m miniature.pretrain vision   --data CROWD --test DIR --start CHECKPOINT --out vision-third.pt
    python -m miniature.pretrain language --start CHECKPOINT --out language-second.pt
    python -m miniature.pretrain renew    --start CHECKPOINT --out DIR    (the folder of both)

`make.sh` and `again.sh` give the numbers of steps. Passes over the images after the first leave the counts of the
class token out. The second pass over the texts has half of the questions as people also type them: in other
words, without the question mark, with a capital letter.

`assemble` puts both into two checkpoints of the published layout, generative and matching, with Q-Formers that
know nothing yet: what the two training stages start from. `renew` puts the image encoder of the third pass and
the language model of the second into a checkpoint: what stage 2 continues from in the second round (`again.sh`).

The others only know training scenes: pairs of kinds that are kept for the test occur in neither. They print their
accuracy on pairs that they have never seen, write a checkpoint now and then, and go on from it when started again.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from blip2 import checkpoint
from blip2.config import Blip2Config, MatcherConfig, QFormerConfig
from blip2.language.opt import OPT
from blip2.model import Blip2, Blip2Matcher
from miniature.language import LANGUAGE, make_matching_tokenizer, train_language
from miniature.vision import VISION, DenseHeads, train_vision

QFORMER = QFormerConfig(
    hidden_size=192, num_layers=5, num_heads=6, intermediate_size=768, encoder_hidden_size=192,
    num_query_tokens=16, max_position_embeddings=64, dropout=0.0,
)  # fmt: skip

SECOND_PASS = 1_000_000  # the seed of its first document, far from those of the first pass
AS_TYPED = 0.5  # how many of its questions are as people also type them


def assemble(folder: Path) -> None:
    """The trained parts with new Q-Formers: ``start-generative`` and ``start-matching`` in ``folder``."""
    encoder = DenseHeads()
    encoder.load_state_dict(torch.load(folder / "vision.pt", weights_only=True)["model"])
    language = OPT(LANGUAGE)
    language.load_state_dict(torch.load(folder / "language.pt", weights_only=True)["model"])
    path = folder / "tokenizer.json"
    image_token = Tokenizer.from_file(str(path)).token_to_id("<image>")

    generative = Blip2(Blip2Config(VISION, QFORMER, LANGUAGE, image_token_id=image_token))
    generative.vision, generative.language = encoder.encoder, language
    checkpoint.save(generative, folder / "start-generative", tokenizer=path)

    words = make_matching_tokenizer()
    qformer = replace(QFORMER, vocab_size=words.get_vocab_size(), has_text=True)
    config = MatcherConfig(VISION, qformer, projection_size=128, bos_token_id=words.token_to_id("[DEC]"))
    matching = Blip2Matcher(config)
    matching.vision = encoder.encoder
    checkpoint.save(matching, folder / "start-matching", tokenizer=words.to_str())


def renew(start: Path, folder: Path) -> None:
    """A generative checkpoint between the renewed parts: ``renewed-generative``."""
    encoder = DenseHeads()
    encoder.load_state_dict(torch.load(folder / "vision-third.pt", weights_only=True)["model"])
    model = checkpoint.load(start)
    model.vision = encoder.encoder
    model.language.load_state_dict(torch.load(folder / "language-second.pt", weights_only=True)["model"])
    checkpoint.save(model, folder / "renewed-generative", tokenizer=start / "tokenizer.json")


def read_again(start: Path, out: Path, steps: int, batch_size: int, documents: int) -> None:
    """The second pass over texts, of the language model of a checkpoint."""
    shutil.copyfile(start / "tokenizer.json", out.with_name("tokenizer.json"))

    def known(tokenizer: Tokenizer) -> OPT:
        language: OPT = checkpoint.load(start).language
        return language

    train_language(out, steps, batch_size, documents, new_model=known, first=SECOND_PASS, as_typed=AS_TYPED, peak=5e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("vision", "language", "assemble", "renew"))
    parser.add_argument("--data", type=Path, nargs="+", help="training pictures, written by miniature.world")
    parser.add_argument("--start", type=Path, help="the pass before, or a checkpoint")
    parser.add_argument("--test", type=Path, help="test pictures, written by miniature.world")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.part == "vision":
        train_vision(
            options.data,
            options.test,
            options.out,
            steps=options.steps,
            batch_size=options.batch_size or 128,
            start=options.start,
        )
    elif options.part == "assemble":
        assemble(options.out)
    elif options.part == "renew":
        renew(options.start, options.out)
    elif options.start is not None:
        read_again(options.start, options.out, options.steps, options.batch_size or 48, options.documents)
    else:
        train_language(options.out, options.steps, options.batch_size or 48, options.documents)


if __name__ == "__main__":
    main()
