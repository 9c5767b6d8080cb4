"""Responses of /v1/chat/completions: as a whole, or as a stream of events.

Events: the role; pieces of content; an empty one with the finish_reason; the usage, if requested; [DONE].
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from blip2.generation import Hypothesis
from blip2.serve.errors import as_api_error
from blip2.serve.tickets import Piece
from blip2.text import Tokenizer

PLACES = 16
"""Log-probabilities per piece of the response, each with up to twenty alternatives."""
FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


class Reply:
    """Builds one response, as a whole or in chunks."""

    def __init__(self, model: str, tokenizer: Tokenizer, has_log_probs: bool) -> None:
        self._tokenizer = tokenizer
        self._has_log_probs = has_log_probs
        self._texts: dict[int, tuple[str, list[int]]] = {}
        self._shared = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Hypothesis], num_prompt_tokens: int) -> Iterator[bytes]:
        """The response, in pieces that are each quick to make."""
        yield f"{packed({**self._shared, 'object': 'chat.completion'})[:-1]},".encode()
        yield b'"choices":['
        for index, answer in enumerate(answers):
            choice = {
                "index": index,
                "message": {"role": "assistant", "content": self._tokenizer.decode(answer.tokens), "refusal": None},
                "finish_reason": FINISH[answer.finish_reason],
            }
            yield f"{',' * (index > 0)}{packed(choice)[:-1]},\"logprobs\":".encode()
            yield from self._log_probs_in_pieces(answer)
            yield b"}"
        usage = _usage(num_prompt_tokens, sum(len(answer.tokens) for answer in answers))
        yield f'],"usage":{packed(usage)}}}'.encode()

    def _log_probs_in_pieces(self, answer: Hypothesis) -> Iterator[bytes]:
        if not self._has_log_probs:
            yield b"null"
            return
        yield b'{"content":['
        for start in range(0, len(answer.tokens), PLACES):
            content = packed(self._content(answer, slice(start, start + PLACES)))
            yield f"{',' * (start > 0)}{content[1:-1]}".encode()
        yield b'],"refusal":null}'

    async def chunks(
        self, pieces: AsyncGenerator[Piece | Hypothesis, None], num_prompt_tokens: int, has_usage: bool
    ) -> AsyncGenerator[str, None]:
        """The events of an answer that is being generated."""
        yield self._chunk(0, {"role": "assistant", "content": ""}, has_usage=has_usage)
        try:
            async for piece in pieces:
                if isinstance(piece, Piece):
                    log_probs = self._log_probs(piece)
                    yield self._chunk(0, {"content": piece.text}, log_probs=log_probs, has_usage=has_usage)
                else:
                    yield self._chunk(0, {}, finish_reason=FINISH[piece.finish_reason], has_usage=has_usage)
                    if has_usage:
                        yield self._usage_chunk(num_prompt_tokens, len(piece.tokens))
        except Exception as error:  # the status was already sent, so an event reports the error
            yield _event(as_api_error(error).body)
            return
        finally:
            await pieces.aclose()
        yield "data: [DONE]\n\n"

    async def chunks_of(
        self, answers: Sequence[Hypothesis], num_prompt_tokens: int, has_usage: bool
    ) -> AsyncGenerator[str, None]:
        """The same events for finished answers."""
        for index, answer in enumerate(answers):
            log_probs = self._log_probs(answer)
            content = self._tokenizer.decode(answer.tokens)
            yield self._chunk(index, {"role": "assistant", "content": ""}, has_usage=has_usage)
            yield self._chunk(index, {"content": content}, log_probs=log_probs, has_usage=has_usage)
            yield self._chunk(index, {}, finish_reason=FINISH[answer.finish_reason], has_usage=has_usage)
        if has_usage:
            yield self._usage_chunk(num_prompt_tokens, sum(len(answer.tokens) for answer in answers))
        yield "data: [DONE]\n\n"

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        log_probs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        has_usage: bool,
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish_reason}
        usage = {"usage": None} if has_usage else {}
        return _event({**self._shared, "object": "chat.completion.chunk", "choices": [choice], **usage})

    def _usage_chunk(self, num_prompt_tokens: int, num_tokens: int) -> str:
        usage = _usage(num_prompt_tokens, num_tokens)
        return _event({**self._shared, "object": "chat.completion.chunk", "choices": [], "usage": usage})

    def _log_probs(self, said: Piece | Hypothesis) -> dict[str, Any] | None:
        if not self._has_log_probs:
            return None
        return {"content": self._content(said, slice(None)), "refusal": None}

    def _content(self, said: Piece | Hypothesis, places: slice) -> list[dict[str, Any]]:
        assert said.log_probs is not None
        tokens = said.tokens[places]
        top = said.top[places] if said.top else [{}] * len(tokens)
        return [
            self._log_prob(token, log_prob)
            | {"top_logprobs": [self._log_prob(other, its) for other, its in others.items()]}
            for token, log_prob, others in zip(tokens, said.log_probs[places], top, strict=True)
        ]

    def _log_prob(self, token: int, log_prob: float) -> dict[str, Any]:
        if token not in self._texts:
            text = self._tokenizer.decode([token])
            self._texts[token] = (text, list(text.encode()))
        text, content = self._texts[token]
        return {"token": text, "logprob": log_prob, "bytes": content}


def _usage(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


def packed(content: Any) -> str:
    """The shortest JSON of a value."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _event(content: dict[str, Any]) -> str:
    return f"data: {packed(content)}\n\n"


class EventStream(StreamingResponse):
    """``on_end`` is called however it ends, also if the client disconnects before the first event."""

    def __init__(
        self, events: AsyncGenerator[str, None], headers: dict[str, str], on_end: Callable[[], None] = lambda: None
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
