"""A conversation about one image: each question is put into the prompt with the earlier turns."""

from __future__ import annotations

import queue
import threading
from bisect import bisect_left
from collections.abc import Generator, Sequence

from blip2.encoded import EncodedImage
from blip2.generation import GenerateOptions
from blip2.tasks.speaker import Speaker
from blip2.text import TextStream, chat_prompt


class Chat:
    """A conversation about one image, which is encoded once.

    ``history``: (question, answer) pairs, oldest first; the caller may edit it. When a conversation exceeds the model's
    context, the oldest turns are dropped from the prompt. ``num_forgotten`` counts them; they stay in ``history``.
    """

    def __init__(self, speaker: Speaker, image: EncodedImage, options: GenerateOptions | None = None) -> None:
        self.image = image
        self.options = options or speaker.defaults.chat
        self.history: list[tuple[str, str]] = []
        self.num_forgotten = 0
        self._speaker = speaker

    def reset(self) -> None:
        """Clear the history; the image stays."""
        self.history.clear()
        self.num_forgotten = 0

    def say(self, question: str) -> str:
        """Answer a question. Raises OptionError if the question is empty or too long for the model."""
        [[best, *_]] = self._speaker.answers([self.image], [self.prompt(question)], self.options)
        self.history.append((question, best.text))
        return best.text

    def stream(self, question: str) -> Generator[str, None, None]:
        """Yield the same answer in pieces, as it is generated (with beam search, which decides at the end: in one
        piece).

        Raises as `say` does, at once. If the caller stops iterating, generation stops, and the history has the answer
        so far.
        """
        prompt = self.prompt(question)
        return self._listen(question, prompt)

    def prompt(self, question: str) -> str:
        """The prompt for a question: as many of the latest turns as fit, then the question."""
        prompt, self.num_forgotten = prompt_that_fits(
            self._speaker, self.history, question, self.options.max_new_tokens
        )
        return prompt

    def _listen(self, question: str, prompt: str) -> Generator[str, None, None]:
        spoken: list[str] = []
        try:
            for piece in stream(self._speaker, self.image, prompt, self.options):
                spoken.append(piece)
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            if spoken:
                self.history.append((question, "".join(spoken)))
            raise
        self.history.append((question, "".join(spoken)))


def prompt_that_fits(
    speaker: Speaker, history: Sequence[tuple[str, str]], question: str, num_new_tokens: int
) -> tuple[str, int]:
    """The prompt with as many of the latest turns as fit, then the question; and the number of dropped turns.

    Raises OptionError if the question is empty.
    """

    def fits(first: int) -> bool:
        return speaker.fits(_prompt(speaker, history[first:], question), num_new_tokens)

    # Fewer turns fit whenever more do, so bisect instead of trying every number of turns.
    first = bisect_left(range(len(history)), True, key=fits)
    return _prompt(speaker, history[first:], question), first


def _prompt(speaker: Speaker, turns: Sequence[tuple[str, str]], question: str) -> str:
    """The prompt of a conversation that begins with the first of these turns."""
    if speaker.template is not None:
        return speaker.question(question, turns)
    return chat_prompt(turns, question, speaker.model.config.manner)


class _Stopped(Exception):
    """The consumer has stopped iterating."""


def stream(speaker: Speaker, image: EncodedImage, prompt: str, options: GenerateOptions) -> Generator[str, None, None]:
    """Generate text after an image and a prompt, in pieces; joined, they are the answer.

    Decoding runs in a separate thread and stops at the next token when the iterator is closed.
    """
    vectors_TD = speaker.prompt(image, prompt, options.max_new_tokens)
    if options.num_beams > 1 or options.num_return > 1:
        # The best one is only known when all are finished.
        [[best, *_]] = speaker.engine.generate([vectors_TD], options)
        yield speaker.answer(best).text
        return
    pieces: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
    text = TextStream(speaker.tokenizer)
    is_stopped = threading.Event()

    def on_token(row: int, token: int) -> None:
        if is_stopped.is_set():
            raise _Stopped
        pieces.put(text.push(token))

    def decode() -> None:
        try:
            speaker.engine.generate([vectors_TD], options, on_token=on_token)
            pieces.put(text.finish())
            pieces.put(None)
        except _Stopped:
            pass
        except Exception as error:  # raised in the consumer
            pieces.put(error)

    thread = threading.Thread(target=decode, name="blip2 answer", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            if piece:
                yield piece
    finally:
        is_stopped.set()
        thread.join()
