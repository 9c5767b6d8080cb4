"""What a benchmark is: a description that everything else goes by, and how published scores were decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blip2.data.kinds import Kind

CAPTION, ASK, CHOOSE, RETRIEVE, PAIR = "caption", "ask", "choose", "retrieve", "pair"
"""What is done with a picture: describe it; answer; choose an answer; find it by its texts, and them by it; tell which
of two texts is whose of two pictures."""
MATCHING = (RETRIEVE, PAIR)
"""For models that match."""


@dataclass(frozen=True)
class Layout:
    """Files of one kind. ``files``: a pattern for each, of its whole path in small letters. ``split``: where they have
    several."""

    kind: Kind
    files: tuple[str, ...]
    split: str = ""


@dataclass(frozen=True)
class Origin:
    """Where something is had: what, from where, and how large it is."""

    what: str
    where: str
    size: str

    def __str__(self) -> str:
        return f"{self.what} ({self.where}, {self.size})"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a score was made. ``prompt``: the beginning of captions, or the words around questions ("" are those of the
    model's family). ``decoding``: options of `GenerateOptions`; ``by_family`` has those that differ by the family of
    the language model. ``image_size``: of the model's pictures, in pixels. ``rule``: of `VQA_RULES`. ``candidates``: of
    a retrieval, how many are read together with what they are found by. ``not_done``: what is done otherwise here."""

    image_size: int
    prompt: str = ""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    by_family: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rule: str = "official"
    candidates: int = 0
    not_done: str = ""

    def decoding_of(self, family: str) -> dict[str, Any]:
        return {**self.decoding, **self.by_family.get(family, {})}


@dataclass(frozen=True)
class Published:
    """Scores in percent (CIDEr and BLEU times 100), by the name of the model on the hub, then by that of the score."""

    source: str
    scores: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """``rows``: pictures or questions in all of it. ``keep``: names of what rows have beside, as
    `data.convert.Conversion` takes them. ``origins``: where its files and pictures are had. ``settings`` and
    ``published``: by protocol. ``server``: the form of the file that others score, of `evaluate.results`; ``result``:
    its name. ``is_scored``: whether the right answers are published. ``has_domains``: whether rows are of several, each
    of which has a CIDEr of its own."""

    title: str
    task: str
    rows: int
    layouts: tuple[Layout, ...]
    origins: tuple[Origin, ...]
    settings: Mapping[str, Settings]
    published: Mapping[str, Published] = field(default_factory=dict)
    keep: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    server: str = ""
    result: str = ""
    is_scored: bool = True
    has_domains: bool = False


PROTOCOLS = ("paper", "lavis")

# ---- settings ----

# The shortest caption is 8 in the authors' code, which counts the four tokens of "a photo of" where the language model
# has no encoder, and the start token where it has one.
CAPTIONS = Settings(
    image_size=364, prompt="a photo of", decoding={"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 4,
                                                   "length_penalty": 1.0, "repetition_penalty": 1.0},
    by_family={"t5": {"min_new_tokens": 7}},
)  # fmt: skip
CAPTIONS_LAVIS = replace(
    CAPTIONS, by_family={}, decoding={"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 8, "length_penalty": 0.0,
                                      "repetition_penalty": 1.15},
)  # fmt: skip
ANSWERS = Settings(
    image_size=224,
    decoding={"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1, "length_penalty": -1.0},
)  # fmt: skip
ANSWERS_LAVIS = replace(
    ANSWERS, prompt="Question: {} Short answer:", by_family={"opt": {"length_penalty": 0.0}}, rule="lavis"
)
ONE_ANSWER = replace(ANSWERS, rule="lavis")  # else letter by letter, as GQA's own program has it
LEMMAS = "LAVIS brings nouns and verbs of the answers to their base form by spaCy, which is not done here"
OKVQA, OKVQA_LAVIS = replace(ANSWERS, not_done=LEMMAS), replace(ANSWERS_LAVIS, not_done=LEMMAS)
RETRIEVAL = Settings(image_size=364, candidates=128)
PAIRS = Settings(image_size=224)
