"""The description of a benchmark, and the decoding settings of published scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blip2.data.kinds import Kind

CAPTION, ASK, CHOOSE, RETRIEVE, PAIR = "caption", "ask", "choose", "retrieve", "pair"
"""The task: caption an image; answer; choose an answer; retrieval in both directions; match two texts to two images."""
MATCHING = (RETRIEVE, PAIR)
"""For matching models."""


@dataclass(frozen=True)
class Layout:
    """A set of files. ``files``: a pattern for each path, in lower case. ``split``: the split in files with several."""

    kind: Kind
    files: tuple[str, ...]
    split: str = ""


@dataclass(frozen=True)
class Origin:
    """Where data can be found: what, where, and its size."""

    what: str
    where: str
    size: str

    def __str__(self) -> str:
        return f"{self.what} ({self.where}, {self.size})"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a score was made. ``prompt``: the prompt of captions, or the template of questions ("" is that of the model's
    family). ``decoding``: options of `GenerateOptions`; ``by_family``: those that depend on the family of the language
    model. ``image_size``: in pixels. ``rule``: one of `VQA_RULES`. ``candidates``: in a retrieval, the number of texts
    or images that are reranked by ITM. ``not_done``: known differences here."""

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
    """Scores in percent (CIDEr and BLEU times 100), by model name on the hub, then by score name."""

    source: str
    scores: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """``rows``: number of images or questions. ``keep``: further fields of rows, as for `data.convert.Conversion`.
    ``origins``: where its files and images can be found. ``settings`` and ``published``: by protocol. ``server``:
    format of the file for its server, see `evaluate.results`; ``result``: that file's name. ``is_scored``: whether the
    references are published. ``has_domains``: whether CIDEr is computed for each domain."""

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

# The minimum length of captions is 8 in the authors' code, which counts the four tokens of "a photo of" for a
# decoder-only language model, and the start token for one with an encoder.
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
ONE_ANSWER = replace(ANSWERS, rule="lavis")  # else exact match, as in GQA's own program
LEMMAS = "LAVIS lemmatizes nouns and verbs of the answers with spaCy, which is not done here"
OKVQA, OKVQA_LAVIS = replace(ANSWERS, not_done=LEMMAS), replace(ANSWERS_LAVIS, not_done=LEMMAS)
RETRIEVAL = Settings(image_size=364, candidates=128)
PAIRS = Settings(image_size=224)
