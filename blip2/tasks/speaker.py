"""Shared by all tasks that generate text: from soft prompts and text to answers, in order, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from blip2.encoded import EncodedImage
from blip2.errors import OptionError, option
from blip2.generation import Engine, GenerateOptions, Hypothesis
from blip2.model import Blip2, identity
from blip2.tasks.defaults import BATCH_SIZE, Defaults, defaults_of
from blip2.template import IMAGE, ChatTemplate
from blip2.text import Tokenizer, chat_prompt, checked_question, clean, question_prompt

Item = TypeVar("Item")


@dataclass(frozen=True)
class Answer:
    """Only new text, without the prompt.

    ``score``: the engine's, comparable among the answers to one prompt. ``tokens``: the new ids. ``finish_reason``: the
    engine's reason for the end.
    """

    text: str
    score: float
    tokens: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Speaker:
    """A generative model, its tokenizer, and the engine that decodes with its language model."""

    model: Blip2
    tokenizer: Tokenizer
    engine: Engine
    instruction_tokenizer: Tokenizer | None = None
    """The Q-Former's tokenizer, if it reads the prompt (InstructBLIP)."""
    template: ChatTemplate | None = None
    """Formats questions; None for BLIP-2's own format."""

    @cached_property
    def identity(self) -> str:
        """The model whose encoded images it accepts (`model.identity`)."""
        return identity(self.model)

    @property
    def defaults(self) -> Defaults:
        """Its default decoding options."""
        return defaults_of(self.model.config)

    def instruction(self, text: str) -> list[int] | None:
        """The prompt's token ids for the Q-Former; None if the Q-Former reads no prompt."""
        if self.instruction_tokenizer is None:
            return None
        return self.instruction_tokenizer.instruction_ids(text, self.model.config.qformer)

    def queries(self, image: EncodedImage, text: str) -> Tensor:
        """The Q-Former's output for an image and a prompt, ``float[Q, D]``, before the projection."""
        if (instruction := self.instruction(text)) is None:
            return image.queries_QD
        return self.model.look(image.queries_QD[None], instruction=instruction)[0]

    def question(self, question: str, turns: Sequence[tuple[str, str]] = ()) -> str:
        """The prompt for a question, after earlier turns (question, answer).

        With a chat template the text contains `template.IMAGE` at the place of the image's vectors; else they come
        first. Raises OptionError as `text.question_prompt` does.
        """
        manner = self.model.config.manner
        if self.template is None:
            return chat_prompt(turns, question, manner) if turns else question_prompt(question, manner)
        cleaned = [(clean(asked), clean(answer)) for asked, answer in turns]
        return self.template.prompt(cleaned, checked_question(question))

    @cached_property
    def _reading(self) -> Tokenizer:
        """The tokenizer for a template's text, which parses names of special tokens."""
        return self.tokenizer.reading_tokens()

    def ids(self, text: str) -> tuple[list[int], list[int]]:
        """The token ids before the image, and after it."""
        config = self.model.config.language
        if self.template is None or IMAGE not in text:
            return [], self.tokenizer.prompt_ids(text, config)
        before, _, after = text.partition(IMAGE)
        first, second = (self.tokenizer.known(self._reading.encode(part), config) for part in (before, after))
        return first, [*second, config.eos_token_id] if config.has_encoder else second

    def answer_ids(self, answer: str) -> list[int]:
        """The token ids of an answer as the model would generate it, with its end (`Tokenizer.answer_ids`)."""
        config = self.model.config.language
        if self.template is None:
            return self.tokenizer.answer_ids(answer, config)
        return [*self.tokenizer.known(self.tokenizer.encode(answer), config), config.eos_token_id]

    @torch.no_grad()
    def prompt(self, image: EncodedImage, text: str, num_new_tokens: int) -> Tensor:
        """The language model's input, ``float[Q + T, D]``: the image's vectors, then the text's, or at the place that a
        chat template gives them.

        Raises OptionError if the image was encoded by another model, or if the prompt and ``num_new_tokens`` more do
        not fit.
        """
        config = self.model.config.language
        table_VD = self.model.language.token_embedding.weight
        shape, num_queries = self.model.config.kept_shape, self.model.config.qformer.num_query_tokens
        if tuple(image.queries_QD.shape) != shape or image.model not in ("", self.identity):
            raise OptionError(
                f"the encoded image (of {list(image.queries_QD.shape)}) comes from another model than this one "
                f"(which reads {list(shape)}); load that model, or encode the image again"
            )
        before, after = self.ids(text)
        num_left = config.max_position_embeddings - num_queries - num_new_tokens
        if (number := len(before) + len(after)) > num_left:
            raise OptionError(
                f"the text has {number} tokens; beside {num_queries} for the image and {num_new_tokens} new ones "
                f"the context has {max(num_left, 0)} left; shorten it, or lower {option('max_new_tokens')}"
            )
        words_TD = self.model.language.embed(torch.tensor([*before, *after], device=table_VD.device))
        first_TD, rest_TD = words_TD.split([len(before), len(after)])
        return torch.cat([first_TD, self.model.prompt(self.queries(image, text)).to(words_TD), rest_TD])

    def tokens_left(self, text: str) -> int:
        """How many new tokens fit after the image and the text; negative if these are too long."""
        return self.tokens_left_after(sum(map(len, self.ids(text))))

    def tokens_left_after(self, num_tokens: int) -> int:
        """As `tokens_left`, for a text of ``num_tokens`` tokens."""
        config = self.model.config
        return config.language.max_position_embeddings - config.qformer.num_query_tokens - num_tokens

    def fits(self, text: str, num_new_tokens: int) -> bool:
        """Whether the image, the text and ``num_new_tokens`` new tokens fit."""
        return num_new_tokens <= self.tokens_left(text)

    def answers(
        self,
        images: Sequence[EncodedImage],
        texts: Sequence[str],
        options: GenerateOptions,
        batch_size: int = BATCH_SIZE,
    ) -> list[list[Answer]]:
        """Continue each pair of image and text: ``options.num_return`` answers each, best first."""
        check_batch_size(batch_size)
        found: list[list[Answer]] = []
        for batch in chunks(pairs(images, texts), batch_size):
            prompts = [self.prompt(image, text, options.max_new_tokens) for image, text in batch]
            for hypotheses in self.engine.generate(prompts, options):
                found.append([self.answer(hypothesis) for hypothesis in hypotheses])
        return found

    def answer(self, hypothesis: Hypothesis) -> Answer:
        """The answer from generated tokens."""
        text = self.tokenizer.decode(hypothesis.tokens)
        return Answer(text, hypothesis.score, list(hypothesis.tokens), hypothesis.finish_reason)


def num_pairs(num_images: int, num_texts: int) -> int:
    """N and N, 1 and N, or N and 1 make N pairs; anything else is an OptionError."""
    if num_images != num_texts and 1 not in (num_images, num_texts):
        raise OptionError(
            f"{num_images} images and {num_texts} texts do not pair up; give as many images as texts, "
            "or a single image or text"
        )
    return num_texts if num_images == 1 else num_images


def pairs(images: Sequence[Item], texts: Sequence[str]) -> list[tuple[Item, str]]:
    """Image and text by position; a single one of either is paired with all of the other."""
    number = num_pairs(len(images), len(texts))
    return [(images[index if len(images) > 1 else 0], texts[index if len(texts) > 1 else 0]) for index in range(number)]


def chunks(items: Iterable[Item], size: int) -> Iterator[Sequence[Item]]:
    """The items in chunks of ``size``, the last one shorter; an iterator is only read chunk by chunk."""
    if isinstance(items, Sequence):
        return (items[start : start + size] for start in range(0, len(items), size))
    remaining = iter(items)
    return iter(lambda: list(islice(remaining, size)), [])


def check_batch_size(batch_size: int) -> None:
    """Raises OptionError unless it is at least 1."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise OptionError(f"{option('batch_size')} is {batch_size!r}; use 1 or more")
