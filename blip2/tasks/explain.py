"""Heat maps: which parts of an image support a text, an answer, or a word of a caption.

A zero bias on the scores of the Q-Former's cross-attention changes nothing, but its gradient is the attention times how
much more the attended patch would raise the score than the others (Grad-CAM on attention, without hooks). Where the
model is certain, that gradient almost vanishes and reflects small doubts ("two" against "three") rather than what was
seen. So it is summed along the path from a blank image to this one, as in integrated gradients (Sundararajan et al.,
2017): over the whole path the score rises from that of the model without the image.

It is evidence, not proof. `miniature/pointing.py` measures it where the places of objects are known.

S steps of the path, P patches with the class token first, D width, C layers with cross-attention, H heads, Q query
tokens, T tokens of a text.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2 import threads
from blip2.checkpoint import why_not_finite
from blip2.config import QFormerConfig
from blip2.encoded import EncodedImage
from blip2.errors import ImageError, NotFiniteError, OptionError, option
from blip2.finite import is_finite
from blip2.generation import GenerateOptions, finished
from blip2.image import RgbImage, Source, overlay
from blip2.language import T5
from blip2.model import Blip2, Blip2Matcher
from blip2.tasks.caption import prompts as caption_prompts
from blip2.tasks.match import ImageFeatures, Reader
from blip2.tasks.see import ImageFrontend
from blip2.tasks.speaker import Speaker
from blip2.text import UNFINISHED, clean, question_prompt

NUM_STEPS = 8
"""Steps of the path from a blank image; half as many are almost as good (miniature/README.md)."""

Score = Callable[[Tensor, Tensor], Tensor]
"""Patches ``float[S, P, D]`` and a bias ``float[C, S, H, Q, P]`` of the cross-attention to scores ``float[S]``."""


Box = tuple[float, float, float, float]
Work = Generator[None, None, "Explanation"]
"""An explanation computed in portions, so that other work can run in between; the return value is the result."""


@dataclass(frozen=True)
class Explanation:
    """A heat map of the image regions that support a text.

    ``heat`` float32[H, W], of the image's own size, 0 to 1: how much each pixel supports the text, relative to the
    strongest (1); all 0 if none does. ``text``: the explained text: the given text, the answer, the word, or the
    caption. ``score``: from a `Matcher` the probability that text and image match (0 to 1); from a `Pipeline` the
    log-probability of the text's tokens.
    """

    heat: Tensor
    text: str
    score: float
    picture: RgbImage = field(repr=False)

    @property
    def strongest(self) -> tuple[int, int] | None:
        """The strongest point, x and y in pixels from the top left; None if there is none."""
        if not self.heat.any():
            return None
        y, x = divmod(int(self.heat.argmax()), self.heat.shape[1])
        return x, y

    def overlay(self) -> RgbImage:
        """The image with the heat map over it, from dark (no support) to bright."""
        return overlay(self.picture, self.heat.numpy())


@dataclass(frozen=True)
class ImagePatches:
    """The original image, and the model's patches of it and of a blank one, ``float[P, D]`` each.

    ``box``: the part of the image that the model gets (`image.seen_box`).
    """

    image: RgbImage
    patches_PD: Tensor
    blank_PD: Tensor
    box: Box | None = None


def image_patches(image: Source, frontend: ImageFrontend[Any], encode: Callable[[Tensor], Tensor]) -> ImagePatches:
    """Encode an image. ``encode`` makes patches from pixels. Raises ImageError, also for an encoded image."""
    if isinstance(image, EncodedImage | ImageFeatures):
        raise ImageError("an encoded image has no pixels to lay the map over; give the image itself")
    loaded = frontend.reading.load(image)
    return ImagePatches(loaded, *frontend.with_blank(frontend.pixels(loaded), encode), frontend.box(loaded))


# ---- what to explain --------------------------------------------------------------------------------


def explain_match(reader: Reader, image_patches: ImagePatches, text: str) -> Explanation:
    """Where the image supports the text, by the matching head (ITM)."""
    return finished(explaining_match(reader, image_patches, text, NUM_STEPS))


def explaining_match(reader: Reader, image_patches: ImagePatches, text: str, at_a_time: int = 1) -> Work:
    """As `explain_match`, with ``at_a_time`` steps of the path per portion."""
    [ids] = reader.ids([text])
    model = reader.model

    def log_odds(patches_SPD: Tensor, image_bias: Tensor) -> Tensor:
        text_ST = torch.tensor([ids] * len(patches_SPD), device=patches_SPD.device)
        mask_ST = torch.ones_like(text_ST, dtype=torch.bool)
        logits_S2 = model.match(patches_SPD, text_ST, mask_ST, image_bias=image_bias)
        return logits_S2[:, 1] - logits_S2[:, 0]

    num_threads = threads.num_useful(model)
    evidence_P, score = yield from gathering(log_odds, image_patches, model.config.qformer, at_a_time, num_threads)
    _check(model, evidence_P, score)
    return _explanation(image_patches, evidence_P, clean(text), 1 / (1 + math.exp(min(-score, 700))))


@dataclass(frozen=True)
class Words:
    """The generated text to explain.

    With ``question``: the ``answer`` to it, by default the generated one. Without: a ``word`` of the ``caption``, or
    the whole caption; by default the generated one.
    """

    question: str | None = None
    answer: str | None = None
    word: str | None = None
    caption: str | None = None

    def check(self) -> None:
        """Raises OptionError for options that exclude each other."""
        if self.question is None and self.answer is not None:
            raise OptionError("an answer needs a question; give both")
        if self.question is not None and not (self.word is self.caption is None):
            raise OptionError("with a question, the whole answer is explained; leave out word and caption")
        if self.question is not None:
            question_prompt(self.question, "opt")


def explain_words(speaker: Speaker, image_patches: ImagePatches, words: Words) -> Explanation:
    """Where the image supports a generated text. Raises OptionError as `Words.check`, and for a missing word.

    For an answer to a question, the given one or (None) the generated one; likewise for a caption, or a word of it. If
    a word occurs several times, the first is explained.
    """
    return finished(explaining_words(speaker, image_patches, words, NUM_STEPS))


def explaining_words(speaker: Speaker, image_patches: ImagePatches, words: Words, at_a_time: int = 1) -> Work:
    """As `explain_words`, in portions: tokens to generate, and ``at_a_time`` steps of the path."""
    words.check()
    if words.question is not None:
        if speaker.template is not None:
            raise OptionError(
                f"answers in a chat template cannot be explained; load the model without {option('chat_template')}"
            )
        prompt = question_prompt(words.question, speaker.model.config.manner)
        tokens = yield from _tokens(speaker, image_patches, prompt, words.answer, speaker.defaults.ask, "answer")
        return (yield from _explaining_tokens(speaker, image_patches, prompt, tokens, slice(None), at_a_time))
    [prompt] = caption_prompts(speaker, [""])
    tokens = yield from _tokens(speaker, image_patches, prompt, words.caption, speaker.defaults.caption, "caption")
    place = slice(None) if words.word is None else find_word(tokens, speaker.tokenizer.decode, words.word)
    return (yield from _explaining_tokens(speaker, image_patches, prompt, tokens, place, at_a_time))


def find_word(tokens: Sequence[int], decode: Callable[[Sequence[int]], str], word: str) -> slice:
    """The tokens of a word, ignoring case. OptionError if the text does not contain it."""
    text = decode(tokens)
    wanted = clean(word)
    if not wanted:
        raise OptionError("the word is empty; give a word of the caption")
    found = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, re.IGNORECASE)
    if found is None:
        raise OptionError(f"the word {wanted!r} is not in the caption {text!r}; give another word or caption")
    # A character may take several tokens; until the last it decodes as incomplete.
    ends = [len(decode(tokens[:number])) for number in range(1, len(tokens) + 1)]
    starts = [len(decode(tokens[:number]).rstrip(UNFINISHED)) for number in range(len(tokens))]
    inside = [number for number in range(len(tokens)) if starts[number] < found.end() and ends[number] > found.start()]
    return slice(inside[0], inside[-1] + 1)


# ---- evidence ----------------------------------------------------------------------------


def evidence(score: Score, image_patches: ImagePatches, config: QFormerConfig) -> tuple[Tensor, float]:
    """How much each patch supports the score, ``float32[P]`` (0 or more), and the score of the image itself.

    Negative evidence of any head in any layer is ignored: it would hide what another head found there.
    """
    return finished(gathering(score, image_patches, config, NUM_STEPS))


def gathering(
    score: Score, image_patches: ImagePatches, config: QFormerConfig, at_a_time: int, num_threads: int = sys.maxsize
) -> Generator[None, None, tuple[Tensor, float]]:
    """As `evidence`, with ``at_a_time`` steps of the path per portion, and at most ``num_threads`` threads."""
    patches_PD = image_patches.patches_PD
    num_layers = len(range(0, config.num_layers, config.cross_attention_frequency))
    along_CHP = torch.zeros(())
    last = math.nan
    for start in range(0, NUM_STEPS, at_a_time):
        steps = range(start + 1, min(start + at_a_time, NUM_STEPS) + 1)
        share_S = torch.tensor(steps, device=patches_PD.device, dtype=patches_PD.dtype) / NUM_STEPS
        way_SPD = torch.lerp(image_patches.blank_PD, patches_PD, share_S[:, None, None])
        shape = (num_layers, len(steps), config.num_heads, config.num_query_tokens, len(patches_PD))
        with torch.inference_mode(False), torch.enable_grad(), threads.at_most(num_threads):
            image_bias = torch.zeros(shape, device=patches_PD.device, dtype=patches_PD.dtype, requires_grad=True)
            score_S = score(way_SPD.clone(), image_bias)
            # Not `backward`, which would store gradients in the model.
            [gradient] = torch.autograd.grad(score_S.sum(), image_bias)
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        along_CHP = along_CHP + gradient.sum(dim=(1, 3)) / NUM_STEPS
        last = float(score_S[-1].detach())
        yield
    return along_CHP.relu().sum(dim=(0, 1)), last


def heat_map(evidence_P: Tensor, height: int, width: int, box: Box | None = None) -> Tensor:
    """Evidence of the patches (with or without a class token first) to ``float32[H, W]``, 0 to 1; 0 outside the box."""
    side = math.isqrt(len(evidence_P))
    grid = evidence_P[-side * side :].unflatten(0, (1, 1, side, side)).float().cpu()
    # Reflect at the border: otherwise a patch would be strongest at its outer edge.
    left, top, right, bottom = box or (0, 0, width, height)
    y_H, x_W = (
        (torch.arange(length) + 0.5 - start) * side / (end - start) - 0.5
        for length, start, end in ((height, top, bottom), (width, left, right))
    )
    places_HW2 = torch.stack(torch.meshgrid(x_W, y_H, indexing="xy"), dim=-1) * (2 / max(side - 1, 1)) - 1
    heat_HW = F.grid_sample(grid, places_HW2[None], mode="bicubic", padding_mode="reflection", align_corners=True)[0, 0]
    is_seen_HW = ((y_H + 0.5 - side / 2).abs() <= side / 2)[:, None] & ((x_W + 0.5 - side / 2).abs() <= side / 2)
    heat_HW = heat_HW.clamp(min=0) * is_seen_HW
    return heat_HW / heat_HW.max().clamp(min=torch.finfo(torch.float32).tiny)


def _explaining_tokens(
    speaker: Speaker, image_patches: ImagePatches, prompt: str, tokens: list[int], explained: slice, at_a_time: int
) -> Work:
    """Where the image supports some of the tokens after a prompt, given those before them."""
    model = speaker.model
    num_queries = model.config.qformer.num_query_tokens
    text_TD = speaker.prompt(_encoded(speaker, image_patches), prompt, len(tokens))[num_queries:]
    instruction = speaker.instruction(prompt)
    read = tokens[: explained.stop]  # later tokens have no influence

    def log_probability(patches_SPD: Tensor, image_bias: Tensor) -> Tensor:
        queries_SQD = model.prompt(model.look(patches_SPD, image_bias, instruction))
        prompt_SED = torch.cat([queries_SQD, text_TD.expand(len(queries_SQD), -1, -1)], dim=1)
        return _log_probabilities(model, prompt_SED, read)[:, explained].sum(dim=1)

    config, num_threads = model.config.qformer, threads.num_useful(model)
    evidence_P, score = yield from gathering(log_probability, image_patches, config, at_a_time, num_threads)
    _check(model, evidence_P, score)
    return _explanation(image_patches, evidence_P, speaker.tokenizer.decode(tokens[explained]), score)


def _log_probabilities(model: Blip2, prompt_SED: Tensor, tokens: list[int]) -> Tensor:
    """The log-probability of each token, given prompts ``float[S, E, D]`` and earlier tokens, ``float[S, T]``;
    differentiable."""
    language = model.language
    rows, length, _ = prompt_SED.shape
    tokens_ST = torch.tensor([tokens] * rows, device=prompt_SED.device)
    if isinstance(language, T5):
        start_S1 = torch.full((rows, 1), language.config.decoder_start_token_id, device=prompt_SED.device)
        lengths_S = torch.full((rows,), length, device=prompt_SED.device)
        hidden_STD = language(prompt_SED, lengths_S, torch.cat([start_S1, tokens_ST[:, :-1]], dim=1))
    else:
        written_STD = language.embed(tokens_ST[:, :-1])
        hidden_STD = language(torch.cat([prompt_SED, written_STD], dim=1))[:, length - 1 :]
    logits_STV = language.logits(hidden_STD)
    log_prob_STV = logits_STV.to(torch.promote_types(logits_STV.dtype, torch.float32)).log_softmax(dim=-1)
    return log_prob_STV.gather(2, tokens_ST.to(log_prob_STV.device)[..., None])[..., 0]


def _check(model: Blip2 | Blip2Matcher, evidence_P: Tensor, score: float) -> None:
    """Raises NotFiniteError for NaN or infinite values."""
    if not (is_finite(evidence_P) and math.isfinite(score)):
        raise NotFiniteError(f"the score or the evidence for it is NaN or infinite: {why_not_finite(model)}")


def _explanation(image_patches: ImagePatches, evidence_P: Tensor, text: str, score: float) -> Explanation:
    width, height = image_patches.image.size
    return Explanation(heat_map(evidence_P, height, width, image_patches.box), text, score, image_patches.image)


def _encoded(speaker: Speaker, image_patches: ImagePatches) -> EncodedImage:
    with torch.no_grad():
        return EncodedImage(speaker.model.kept(image_patches.patches_PD[None])[0], speaker.identity)


def _tokens(
    speaker: Speaker, image_patches: ImagePatches, prompt: str, given: str | None, options: GenerateOptions, what: str
) -> Generator[None, None, list[int]]:
    """The tokens of a text as the model would generate it, without its end; for None those that the model generates."""
    if given is not None:
        if not clean(given):
            raise OptionError(f"the {what} is empty; write one, or leave it out to explain the generated one")
        return speaker.tokenizer.answer_ids(clean(given), speaker.model.config.language)[:-1]
    prompt_TD = speaker.prompt(_encoded(speaker, image_patches), prompt, options.max_new_tokens)
    [[own, *_]] = yield from speaker.engine.generating([prompt_TD], options)
    if not speaker.tokenizer.decode(own.tokens):
        raise OptionError(f"the generated {what} is empty; give the {what}")
    return own.tokens
