"""`Pipeline`: a generative model that captions, answers and chats."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, TypedDict, Unpack, overload

from torch import Tensor

from blip2.checkpoint import ImageSettings, damage
from blip2.encoded import EncodedImage
from blip2.errors import ImageError, OptionError, option
from blip2.generation import Engine
from blip2.image import DEFAULT_READING, Reading, Source
from blip2.model import Blip2
from blip2.tasks import ask as ask_task
from blip2.tasks import caption as caption_task
from blip2.tasks.ask import Choice
from blip2.tasks.chat import Chat
from blip2.tasks.defaults import BATCH_SIZE, merged
from blip2.tasks.explain import Explanation, Words, explain_words, sight
from blip2.tasks.see import Eye, OnError, Result, Seen, checked, in_batches, repeated
from blip2.tasks.speaker import Answer, Speaker, num_pairs
from blip2.template import ChatTemplate
from blip2.text import Tokenizer

Picture = Source | EncodedImage


class Options(TypedDict, total=False):
    """The keywords of `GenerateOptions`; what is not given is as the model's authors have it for the task."""

    max_new_tokens: int
    min_new_tokens: int
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_return: int
    sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    stop: tuple[str, ...] | list[str] | str
    seed: int | None


class Pipeline:
    """A model with all that it needs to speak of pictures; `load` makes one.

    Pictures may be paths, addresses, bytes, PIL images, arrays or tensors (see `image.load_image`), or encoded ones.
    ``reading``: how large they may be, and whether they may lack their end. ``instruction_tokenizer``: the Q-Former's,
    of an InstructBLIP. It can be pickled.
    """

    def __init__(
        self,
        model: Blip2,
        tokenizer: Tokenizer,
        settings: ImageSettings,
        *,
        name: str = "model",
        reading: Reading = DEFAULT_READING,
        instruction_tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        self.name = name
        config = model.config
        engine = Engine(
            model.language,
            eos_token_ids=config.language.end_token_ids,
            # It marks where an image belongs in a prompt, and never is a word of an answer.
            suppress_token_ids=[] if config.image_token_id is None else [config.image_token_id],
            decode=tokenizer.decode,
            damage=partial(damage, model),
        )
        self.speaker = Speaker(model.eval(), tokenizer, engine, instruction_tokenizer, template)
        self.eye = Eye(
            model.vision,
            self._see,
            EncodedImage,
            **asdict(settings),
            reading=reading,
            damage=partial(damage, model),
        )

    def _see(self, pixels_BCHW: Tensor) -> list[EncodedImage]:
        # A copy each, so that who keeps one image does not keep its batch.
        identity = self.speaker.identity
        return [EncodedImage(queries_QD.clone(), identity) for queries_QD in self.speaker.model.encode(pixels_BCHW)]

    def __repr__(self) -> str:
        return f"<Pipeline {self.name} on {next(self.speaker.model.parameters()).device}>"

    # ---- pictures to values ----

    @overload
    def encode(self, images: Picture, *, batch_size: int = ...) -> EncodedImage: ...
    @overload
    def encode(self, images: list[Any] | tuple[Any, ...], *, batch_size: int = ...) -> list[EncodedImage]: ...
    def encode(
        self, images: Picture | Sequence[Picture], *, batch_size: int = BATCH_SIZE
    ) -> EncodedImage | list[EncodedImage]:
        """What the language model sees of a picture: encode once, ask often. Raises ImageError."""
        seen: list[Any] = list(self.each_encoded(listed(images), batch_size=batch_size))
        return seen if is_list(images) else seen[0]

    # ---- captions ----

    def caption(
        self,
        images: Picture | Sequence[Picture],
        *,
        prompt: str | Sequence[str] = "",
        num_captions: int = 1,
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
        **options: Unpack[Options],
    ) -> Any:
        """Describe pictures: a text for one, a list for a list; a list of texts each if ``num_captions`` is above 1.

        ``prompt`` is the beginning of the caption ("a photo of"), not part of what comes back. ``on_error``
        decides about a picture that cannot be read: "raise" its ImageError, or "return" it in its place.
        Options are those of `GenerateOptions`; raises OptionError for one that is not possible.
        """
        options = {**options, "num_return": num_captions} if num_captions != 1 else options
        found = self.each_caption(images, prompt=prompt, on_error=on_error, batch_size=batch_size, **options)
        texts = [_texts(answers) for answers in found]
        return texts if is_list(images) or is_list(prompt) else texts[0]

    def each_caption(
        self,
        images: Picture | Sequence[Picture],
        *,
        prompt: str | Sequence[str] = "",
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
        **options: Unpack[Options],
    ) -> Generator[list[Answer] | ImageError, None, None]:
        """As `caption`, but one after the other as their batches are done, and with scores and tokens.

        For collections of any size: only the pictures of two batches are in memory at a time. Yields for each
        picture its answers, the best first, or (``on_error="return"``) the ImageError.
        """
        chosen = merged(self.speaker.defaults.caption, options)

        def describe(seen: list[EncodedImage], prompts: list[str]) -> list[list[Answer]]:
            return caption_task.caption(self.speaker, seen, prompts, options=chosen, batch_size=batch_size)

        return self._each(describe, images, prompt, on_error, batch_size)

    # ---- questions ----

    def ask(
        self,
        images: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        *,
        choices: Sequence[str] | None = None,
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
        **options: Unpack[Options],
    ) -> Any:
        """Answer questions: N about N pictures, one about N, or N about one; a text for one, else a list in order.

        Give the question alone; the words that the model expects around it are added. With ``choices`` the answer
        is the likeliest of them (see `rank` for all of them with their probabilities). ``on_error`` as in `caption`.
        """
        if choices is None:
            found = self.each_answer(images, questions, on_error=on_error, batch_size=batch_size, **options)
            texts = [_texts(answers) for answers in found]
        elif options:
            unused = option(next(iter(options)))
            raise OptionError(f"{unused} means nothing with choices: no answer is written; leave it out")
        else:
            ranked = self.each_ranking(images, questions, choices, on_error=on_error, batch_size=batch_size)
            texts = [row if isinstance(row, ImageError) else row[0].text for row in ranked]
        return texts if is_list(images) or is_list(questions) else texts[0]

    def each_answer(
        self,
        images: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        *,
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
        **options: Unpack[Options],
    ) -> Generator[list[Answer] | ImageError, None, None]:
        """As `ask`, but one after the other as their batches are done, and with scores and tokens."""
        chosen = merged(self.speaker.defaults.ask, options)
        ask_task.prompts(self.speaker, listed(questions))  # what is wrong with one is told before the work begins

        def answer(seen: list[EncodedImage], asked: list[str]) -> list[list[Answer]]:
            return ask_task.ask(self.speaker, seen, asked, options=chosen, batch_size=batch_size)

        return self._each(answer, images, questions, on_error, batch_size)

    def rank(
        self,
        images: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        choices: Sequence[str],
        *,
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
    ) -> Any:
        """The choices, the likeliest first, each with its probability among them; a list of such for a list.

        See `tasks.ask.rank` for what the probabilities mean.
        """
        ranked = list(self.each_ranking(images, questions, choices, on_error=on_error, batch_size=batch_size))
        return ranked if is_list(images) or is_list(questions) else ranked[0]

    def each_ranking(
        self,
        images: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        choices: Sequence[str],
        *,
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
    ) -> Generator[list[Choice] | ImageError, None, None]:
        """As `rank`, but one after the other as their batches are done."""
        choices = ask_task.check_choices(choices)
        ask_task.prompts(self.speaker, listed(questions))

        def choose(seen: list[EncodedImage], asked: list[str]) -> list[list[Choice]]:
            return ask_task.rank(self.speaker, seen, asked, choices, batch_size=batch_size)

        return self._each(choose, images, questions, on_error, batch_size)

    # ---- where it looks ----

    def explain(
        self,
        image: Source,
        *,
        question: str | None = None,
        answer: str | None = None,
        word: str | None = None,
        caption: str | None = None,
    ) -> Explanation:
        """Where in a picture the model finds what speaks for its words: a map of its pixels, see `Explanation`.

        With ``question``: for the ``answer`` to it, by default the model's own. Without: for a ``word`` of the
        ``caption``, or for all of it; by default the model's own. It is evidence, not proof.

        Raises ImageError, and OptionError for a word that is not in the caption, or what does not go together.
        """
        words = Words(question, answer, word, caption)
        words.check()
        return explain_words(self.speaker, sight(image, self.eye, self.speaker.model.patches), words)

    # ---- conversation ----

    def chat(self, image: Picture, **options: Unpack[Options]) -> Chat:
        """A conversation about one picture: `Chat.say` a question, or `Chat.stream` its answer as it is written."""
        return Chat(self.speaker, self.encode(image), merged(self.speaker.defaults.chat, options))

    # ---- what they share ----

    def each_encoded(
        self, images: Sequence[Picture], *, on_error: OnError = "raise", batch_size: int = BATCH_SIZE
    ) -> Seen[EncodedImage]:
        """As `encode`, but one after the other as their batches are done."""
        return checked(self.eye.see, images, on_error, batch_size)

    def _each(
        self,
        task: Callable[[list[EncodedImage], list[str]], list[Result]],
        images: Picture | Sequence[Picture],
        texts: str | Sequence[str],
        on_error: OnError,
        batch_size: int,
    ) -> Generator[Result | ImageError, None, None]:
        """The task's results for pairs of image and text, in order. What is wrong with the numbers is told at once."""
        pictures, asked = listed(images), listed(texts)
        number = num_pairs(len(pictures), len(asked))
        seen = self.each_encoded(pictures, on_error=on_error, batch_size=batch_size)
        if len(pictures) == 1:
            seen = repeated(seen, number)
        return in_batches(task, seen, asked * number if len(asked) == 1 else asked, batch_size)


def is_list(given: object) -> bool:
    return isinstance(given, list | tuple)


def listed(given: Any) -> list[Any]:
    return list(given) if is_list(given) else [given]


def _texts(answers: list[Answer] | ImageError) -> str | list[str] | ImageError:
    """One answer as a text, several as a list of texts."""
    if isinstance(answers, ImageError):
        return answers
    return answers[0].text if len(answers) == 1 else [answer.text for answer in answers]
