"""Tasks for the models' thread: prompts to answer, and other work in portions."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from blip2.encoded import EncodedImage
from blip2.generation import GenerateOptions, Hypothesis, Job
from blip2.generation.strategies import RowByRow
from blip2.serve.cache import Look
from blip2.tasks.speaker import Speaker
from blip2.text import TextStream

Value = TypeVar("Value")

Steps = Generator[None, None, Value]
"""Work in portions: between two of them other work runs. Its return value is the result."""


@dataclass(frozen=True)
class Piece:
    """A piece of an answer that is being generated, and its tokens."""

    text: str
    tokens: list[int]
    log_probs: list[float]
    top: list[dict[int, float]] | None = None
    """See `Hypothesis`."""


OnPiece = Callable[[Piece], None]
"""Called in the models' thread."""


@dataclass(eq=False)
class Ticket:
    """A prompt with its image and options, and where its answers go."""

    look: Look[EncodedImage]
    text: str
    options: GenerateOptions
    on_piece: OnPiece | None = None
    """Called with each piece of the only answer; then there are no beams, and ``num_return`` is 1."""
    num_top: int = 0
    """Number of most likely tokens to report at each position."""
    client: str = ""
    """The client; clients take turns."""
    answers: Future[list[Hypothesis]] = field(default_factory=Future)
    num_prompt_tokens: int = 0
    """Number of prompt tokens, image included; known when the answers are."""
    is_cancelled: bool = False
    arrived_s: float = field(default_factory=time.monotonic)
    num_overtaken: int = 0
    """Rows given to other tickets since it could have had its turn."""

    @property
    def num_rows(self) -> int:
        return max(self.options.num_beams, self.options.num_return)

    @property
    def num_tokens(self) -> int:
        """Maximum tokens of all rows."""
        return self.num_rows * self.options.max_new_tokens


@dataclass(frozen=True, eq=False)
class Call(Generic[Value]):
    """Work of another kind. Cancelling ``result`` ends it after the current portion."""

    steps: Steps[Value]
    client: str
    result: Future[Value] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class Running:
    ticket: Ticket
    job: Job
    finish_text: Callable[[], None]


def begun(ticket: Ticket, image: EncodedImage, speaker: Speaker) -> Running:
    """The job for a ticket, to add to a batch. Raises as `Speaker.prompt` and `Engine.job` do."""
    prompt_TD = speaker.prompt(image, ticket.text, ticket.options.max_new_tokens)
    ticket.num_prompt_tokens = len(prompt_TD)
    if ticket.on_piece is None:
        job = speaker.engine.job([prompt_TD], ticket.options, num_top=ticket.num_top)
        return Running(ticket, job, lambda: None)
    on_piece = ticket.on_piece
    text = TextStream(speaker.tokenizer)
    pending: list[int] = []
    num_sent = 0

    def on_token(row: int, token: int) -> None:
        pending.append(token)
        if piece := text.push(token):
            send(piece)

    def send(piece: str) -> None:
        nonlocal num_sent
        own = slice(num_sent, num_sent + len(pending))
        top = strategy.top[0][own] if ticket.num_top else None
        on_piece(Piece(piece, pending.copy(), strategy.log_probs[0][own], top))
        num_sent = own.stop
        pending.clear()

    def finish_text() -> None:
        piece = text.finish()
        if piece or pending:
            send(piece)

    job = speaker.engine.job([prompt_TD], ticket.options, on_token=on_token, num_top=ticket.num_top)
    assert isinstance(job.strategy, RowByRow)  # beam search cannot be streamed
    strategy: RowByRow = job.strategy
    return Running(ticket, job, finish_text)
