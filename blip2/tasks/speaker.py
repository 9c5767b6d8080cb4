"""What every task that answers in words shares: from soft prompts and text to answers, in order, in batches."""

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
    """New text only, never the prompt.

    ``score``: the engine's, comparable among the answers to one prompt. ``tokens``: the new ids.
    ``finish_reason``: why it ends there, as the engine tells.
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
    """Of the Q-Former, where that reads the prompt (InstructBLIP)."""
    template: ChatTemplate | None = None
    """By which questions are worded; None for the wording of BLIP-2 itself."""

    @cached_property
    def identity(self) -> str:
        """Whose encoded images it reads (`model.identity`)."""
        return identity(self.model)

    @property
    def defaults(self) -> Defaults:
        """How it decodes unless told otherwise."""
        return defaults_of(self.model.config)

    def instruction(self, text: str) -> list[int] | None:
        """The token ids that the Q-Former reads of a prompt beside the image; None where it reads none."""
        if self.instruction_tokenizer is None:
            return None
        return self.instruction_tokenizer.instruction_ids(text, self.model.config.qformer)

    def queries(self, image: EncodedImage, text: str) -> Tensor:
        """The Q-Former's view of an image ``float[Q, D]``, before the projection, for a prompt."""
        if (instruction := self.instruction(text)) is None:
            return image.queries_QD
        return self.model.look(image.queries_QD[None], instruction=instruction)[0]

    def question(self, question: str, turns: Sequence[tuple[str, str]] = ()) -> str:
        """A question, after earlier turns (question, answer), in the words that the model is asked in.

        With a chat template the text has `template.IMAGE` where the image's vectors go; else they go before it.
        Raises OptionError as `text.question_prompt` does.
        """
        manner = self.model.config.manner
        if self.template is None:
            return chat_prompt(turns, question, manner) if turns else question_prompt(question, manner)
        said = [(clean(asked), clean(answer)) for asked, answer in turns]
        return self.template.prompt(said, checked_question(question))

    @cached_property
    def _reading(self) -> Tokenizer:
        """For a template's words, in which the names of special tokens are these."""
        return self.tokenizer.reading_tokens()

    def ids(self, text: str) -> tuple[list[int], list[int]]:
        """What the language model reads before the image, and after it."""
        config = self.model.config.language
        if self.template is None or IMAGE not in text:
            return [], self.tokenizer.prompt_ids(text, config)
        before, _, after = text.partition(IMAGE)
        first, second = (self.tokenizer.known(self._reading.encode(part), config) for part in (before, after))
        return first, [*second, config.eos_token_id] if config.has_encoder else second

    def answer_ids(self, answer: str) -> list[int]:
        """An answer as the model would write it, its end included (`Tokenizer.answer_ids`)."""
        config = self.model.config.language
        if self.template is None:
            return self.tokenizer.answer_ids(answer, config)
        return [*self.tokenizer.known(self.tokenizer.encode(answer), config), config.eos_token_id]

    @torch.no_grad()
    def prompt(self, image: EncodedImage, text: str, num_new_tokens: int) -> Tensor:
        """What the language model reads, ``float[Q + T, D]``: the image's vectors, then the text's, or where a chat
        template has them within the text.

        Raises OptionError if the image was encoded for another model, or if the prompt and
        ``num_new_tokens`` more do not fit.
        """
        config = self.model.config.language
        table_VD = self.model.language.token_embedding.weight
        shape, num_queries = self.model.config.kept_shape, self.model.config.qformer.num_query_tokens
        if tuple(image.queries_QD.shape) != shape or image.model not in ("", self.identity):
            raise OptionError(
                f"the encoded image (of {list(image.queries_QD.shape)}) was encoded by another model than this one "
                f"(which reads {list(shape)}); load that model, or encode the image again"
            )
        before, after = self.ids(text)
        room = config.max_position_embeddings - num_queries - num_new_tokens
        if (number := len(before) + len(after)) > room:
            raise OptionError(
                f"the text has {number} tokens; beside {num_queries} for the image and {num_new_tokens} new ones "
                f"this model has room for {max(room, 0)}; shorten it, or lower {option('max_new_tokens')}"
            )
        words_TD = self.model.language.embed(torch.tensor([*before, *after], device=table_VD.device))
        first_TD, rest_TD = words_TD.split([len(before), len(after)])
        return torch.cat([first_TD, self.model.prompt(self.queries(image, text)).to(words_TD), rest_TD])

    def room(self, text: str) -> int:
        """How many new tokens the model has room for beside the image and the text; less than 0 if these are too
        many."""
        return self.room_beside(sum(map(len, self.ids(text))))

    def room_beside(self, num_tokens: int) -> int:
        """As `room`, beside a text of so many tokens."""
        config = self.model.config
        return config.language.max_position_embeddings - config.qformer.num_query_tokens - num_tokens

    def fits(self, text: str, num_new_tokens: int) -> bool:
        """Whether the model has room for the image, the text and as many new tokens."""
        return num_new_tokens <= self.room(text)

    def answers(
        self,
        images: Sequence[EncodedImage],
        texts: Sequence[str],
        options: GenerateOptions,
        batch_size: int = BATCH_SIZE,
    ) -> list[list[Answer]]:
        """Go on from each pair of image and text: ``options.num_return`` answers each, the best first."""
        check_batch_size(batch_size)
        found: list[list[Answer]] = []
        for batch in chunks(pairs(images, texts), batch_size):
            prompts = [self.prompt(image, text, options.max_new_tokens) for image, text in batch]
            for hypotheses in self.engine.generate(prompts, options):
                found.append([self.answer(hypothesis) for hypothesis in hypotheses])
        return found

    def answer(self, hypothesis: Hypothesis) -> Answer:
        """Tokens to text."""
        text = self.tokenizer.decode(hypothesis.tokens)
        return Answer(text, hypothesis.score, list(hypothesis.tokens), hypothesis.finish_reason)


def num_pairs(num_images: int, num_texts: int) -> int:
    """N and N, 1 and N, or N and 1 make N pairs; anything else is an OptionError."""
    if num_images != num_texts and 1 not in (num_images, num_texts):
        raise OptionError(
            f"{num_images} images and {num_texts} texts do not pair up; give as many of the one as of the other, "
            "or a single one of either"
        )
    return num_texts if num_images == 1 else num_images


def pairs(images: Sequence[Item], texts: Sequence[str]) -> list[tuple[Item, str]]:
    """Image and text by position; a single one of either goes with all of the other."""
    number = num_pairs(len(images), len(texts))
    return [(images[index if len(images) > 1 else 0], texts[index if len(texts) > 1 else 0]) for index in range(number)]


def chunks(items: Iterable[Item], size: int) -> Iterator[Sequence[Item]]:
    """The items in runs of ``size``, the last one shorter; what is no sequence is asked for a run when it is due."""
    if isinstance(items, Sequence):
        return (items[start : start + size] for start in range(0, len(items), size))
    remaining = iter(items)
    return iter(lambda: list(islice(remaining, size)), [])


def check_batch_size(batch_size: int) -> None:
    """At least 1, else an OptionError."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise OptionError(f"{option('batch_size')}={batch_size} is not possible; use 1 or more")
