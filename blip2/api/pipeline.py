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
from blip2.tasks.explain import Explanation, Words, explain_words, image_patches
from blip2.tasks.see import ImageFrontend, OnError, Result, Seen, checked, in_batches, repeated
from blip2.tasks.speaker import Answer, Speaker, num_pairs
from blip2.template import ChatTemplate
from blip2.text import Tokenizer

Encodable = Source | EncodedImage


class Options(TypedDict, total=False):
    """The keywords of `GenerateOptions`. The defaults are those of the model's authors for the task."""

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
    """A generative model with its tokenizer and image settings; `load` creates one.

    Images are paths, URLs, bytes, PIL images, arrays or tensors (see `image.load_image`), or `EncodedImage`.
    ``reading``: limits for reading images. ``instruction_tokenizer``: the Q-Former's tokenizer of an InstructBLIP.
    Can be pickled.
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
            # The token marks the place of the image in a prompt, and must not be generated.
            suppress_token_ids=[] if config.image_token_id is None else [config.image_token_id],
            decode=tokenizer.decode,
            damage=partial(damage, model),
        )
        self.speaker = Speaker(model.eval(), tokenizer, engine, instruction_tokenizer, template)
        self.frontend = ImageFrontend(
            model.vision,
            self._see,
            EncodedImage,
            **asdict(settings),
            reading=reading,
            damage=partial(damage, model),
        )

    def _see(self, pixels_BCHW: Tensor) -> list[EncodedImage]:
        # Copies, so that keeping one image does not keep its whole batch.
        identity = self.speaker.identity
        return [EncodedImage(queries_QD.clone(), identity) for queries_QD in self.speaker.model.encode(pixels_BCHW)]

    def __repr__(self) -> str:
        return f"<Pipeline {self.name} on {next(self.speaker.model.parameters()).device}>"

    # ---- encoding ----

    @overload
    def encode(self, images: Encodable, *, batch_size: int = ...) -> EncodedImage: ...
    @overload
    def encode(self, images: list[Any] | tuple[Any, ...], *, batch_size: int = ...) -> list[EncodedImage]: ...
    def encode(
        self, images: Encodable | Sequence[Encodable], *, batch_size: int = BATCH_SIZE
    ) -> EncodedImage | list[EncodedImage]:
        """Run the image encoder and the Q-Former: an `EncodedImage`, or a list for a list. Raises ImageError."""
        seen: list[Any] = list(self.each_encoded(listed(images), batch_size=batch_size))
        return seen if is_list(images) else seen[0]

    # ---- captions ----

    def caption(
        self,
        images: Encodable | Sequence[Encodable],
        *,
        prompt: str | Sequence[str] = "",
        num_captions: int = 1,
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
        **options: Unpack[Options],
    ) -> Any:
        """Generate captions: a text for one image, a list for a list; lists of texts if ``num_captions`` is above 1.

        ``prompt``: text that the caption continues ("a photo of"); it is not repeated in the result. ``on_error``:
        what to do with an unreadable image: "raise" its ImageError, or "return" it in its place. Other options are
        those of `GenerateOptions`. Raises OptionError for an invalid value.
        """
        options = {**options, "num_return": num_captions} if num_captions != 1 else options
        found = self.each_caption(images, prompt=prompt, on_error=on_error, batch_size=batch_size, **options)
        texts = [_texts(answers) for answers in found]
        return texts if is_list(images) or is_list(prompt) else texts[0]

    def each_caption(
        self,
        images: Encodable | Sequence[Encodable],
        *,
        prompt: str | Sequence[str] = "",
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
        **options: Unpack[Options],
    ) -> Generator[list[Answer] | ImageError, None, None]:
        """Like `caption`, but a generator that yields as batches finish, with scores and tokens.

        For collections of any size: only the images of two batches are in memory at a time. Yields the answers of
        each image, best first, or (``on_error="return"``) the ImageError.
        """
        chosen = merged(self.speaker.defaults.caption, options)

        def describe(seen: list[EncodedImage], prompts: list[str]) -> list[list[Answer]]:
            return caption_task.caption(self.speaker, seen, prompts, options=chosen, batch_size=batch_size)

        return self._each(describe, images, prompt, on_error, batch_size)

    # ---- questions ----

    def ask(
        self,
        images: Encodable | Sequence[Encodable],
        questions: str | Sequence[str],
        *,
        choices: Sequence[str] | None = None,
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
        **options: Unpack[Options],
    ) -> Any:
        """Answer questions: N about N images, one about N, or N about one. A text for one, else a list in order.

        Give only the question: the prompt template that the model expects is added. With ``choices``, the result is
        the most likely of them (`rank` returns all with their probabilities). ``on_error`` as in `caption`.
        """
        if choices is None:
            found = self.each_answer(images, questions, on_error=on_error, batch_size=batch_size, **options)
            texts = [_texts(answers) for answers in found]
        elif options:
            unused = option(next(iter(options)))
            raise OptionError(f"{unused} has no effect with choices: nothing is generated; leave it out")
        else:
            ranked = self.each_ranking(images, questions, choices, on_error=on_error, batch_size=batch_size)
            texts = [row if isinstance(row, ImageError) else row[0].text for row in ranked]
        return texts if is_list(images) or is_list(questions) else texts[0]

    def each_answer(
        self,
        images: Encodable | Sequence[Encodable],
        questions: str | Sequence[str],
        *,
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
        **options: Unpack[Options],
    ) -> Generator[list[Answer] | ImageError, None, None]:
        """Like `ask`, but a generator that yields as batches finish, with scores and tokens."""
        chosen = merged(self.speaker.defaults.ask, options)
        ask_task.prompts(self.speaker, listed(questions))  # checks the questions before the work begins

        def answer(seen: list[EncodedImage], asked: list[str]) -> list[list[Answer]]:
            return ask_task.ask(self.speaker, seen, asked, options=chosen, batch_size=batch_size)

        return self._each(answer, images, questions, on_error, batch_size)

    def rank(
        self,
        images: Encodable | Sequence[Encodable],
        questions: str | Sequence[str],
        choices: Sequence[str],
        *,
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
    ) -> Any:
        """The choices with their probabilities, most likely first; a list of such lists for a list.

        See `tasks.ask.rank` for what the probabilities mean.
        """
        ranked = list(self.each_ranking(images, questions, choices, on_error=on_error, batch_size=batch_size))
        return ranked if is_list(images) or is_list(questions) else ranked[0]

    def each_ranking(
        self,
        images: Encodable | Sequence[Encodable],
        questions: str | Sequence[str],
        choices: Sequence[str],
        *,
        on_error: OnError = "raise",
        batch_size: int = BATCH_SIZE,
    ) -> Generator[list[Choice] | ImageError, None, None]:
        """Like `rank`, but a generator that yields as batches finish."""
        choices = ask_task.check_choices(choices)
        ask_task.prompts(self.speaker, listed(questions))

        def choose(seen: list[EncodedImage], asked: list[str]) -> list[list[Choice]]:
            return ask_task.rank(self.speaker, seen, asked, choices, batch_size=batch_size)

        return self._each(choose, images, questions, on_error, batch_size)

    # ---- explanations ----

    def explain(
        self,
        image: Source,
        *,
        question: str | None = None,
        answer: str | None = None,
        word: str | None = None,
        caption: str | None = None,
    ) -> Explanation:
        """A heat map of the image regions that a generated text comes from, see `Explanation`.

        With ``question``: for the ``answer`` to it, by default the generated one. Without: for a ``word`` of the
        ``caption``, or for the whole caption, by default the generated one. It is evidence, not proof.

        Raises ImageError, and OptionError for a word that is not in the caption or for options that exclude each
        other.
        """
        words = Words(question, answer, word, caption)
        words.check()
        return explain_words(self.speaker, image_patches(image, self.frontend, self.speaker.model.patches), words)

    # ---- conversation ----

    def chat(self, image: Encodable, **options: Unpack[Options]) -> Chat:
        """Start a conversation about one image: `Chat.say` answers a question, `Chat.stream` yields the answer in
        pieces."""
        return Chat(self.speaker, self.encode(image), merged(self.speaker.defaults.chat, options))

    # ---- shared by all tasks ----

    def each_encoded(
        self, images: Sequence[Encodable], *, on_error: OnError = "raise", batch_size: int = BATCH_SIZE
    ) -> Seen[EncodedImage]:
        """Like `encode`, but a generator that yields as batches finish."""
        return checked(self.frontend.see, images, on_error, batch_size)

    def _each(
        self,
        task: Callable[[list[EncodedImage], list[str]], list[Result]],
        images: Encodable | Sequence[Encodable],
        texts: str | Sequence[str],
        on_error: OnError,
        batch_size: int,
    ) -> Generator[Result | ImageError, None, None]:
        """The task's results for pairs of image and text, in order. Checks their numbers at once."""
        many, asked = listed(images), listed(texts)
        number = num_pairs(len(many), len(asked))
        seen = self.each_encoded(many, on_error=on_error, batch_size=batch_size)
        if len(many) == 1:
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
