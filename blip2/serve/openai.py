"""``/v1``: OpenAI's API."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from fastapi import APIRouter, Request, Response

from blip2.generation import GenerateOptions
from blip2.serve.attention import Attended
from blip2.serve.decoding import fitting, options_of
from blip2.serve.described import body_of
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.names import Names
from blip2.serve.reply import EventStream, Reply, packed
from blip2.serve.schemas import ChatRequest, EmbeddingsRequest
from blip2.serve.service import Service
from blip2.serve.tickets import Steps, Ticket
from blip2.tasks import ask, caption
from blip2.tasks.chat import prompt_that_fits
from blip2.tasks.defaults import CHAT
from blip2.tasks.speaker import Speaker
from blip2.text import LONG_TEXT

MAX_LOG_PROBS = 100_000
"""Maximum log-probabilities in one answer, about a hundred bytes each."""


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", route_class=Attended)
    names = Names(service)

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": names.all()}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        for found in names.all():
            if name in (found["id"], "blip2"):
                return found
        raise names.unknown(name)

    @routes.post("/chat/completions", openapi_extra=body_of("/v1/chat/completions"))
    async def chat(request: Request) -> Response:
        """Chat completions. A question is answered as by `Pipeline.ask`, an image without text is captioned, several
        turns are a `Chat`. Streaming and logprobs use greedy decoding."""
        async with service.readings.read(request) as reading:
            body = ChatRequest.model_construct(**reading.fields)
            name = names.generative(body.model)
            history, question = reading.fields["history"], reading.fields["question"]
            is_stream, has_log_probs = bool(body.stream), bool(body.logprobs)
            defaults = service.pipeline.speaker.defaults
            options = options_of(
                body,
                defaults.chat if history else defaults.ask if question else defaults.caption,
                service.limits,
                is_followed=is_stream or has_log_probs,
            )
            check_log_probs(body, options)
            pipeline = service.pipeline
            given = question + "".join(map("".join, history))
            work = partial(prompt_of, pipeline.speaker, history, question, options, service.limits)
            text, options, num_forgotten = await service.read_text(reading.client, given, work)
            look = await reading.look(0, service.worker.images)
            ticket = Ticket(look, text, options, num_top=body.top_logprobs or 0, client=reading.client)
        headers = ignored(reading.fields)
        if num_forgotten:
            headers["X-Blip2-Forgotten-Turns"] = str(num_forgotten)
        reply = Reply(name, pipeline.speaker.tokenizer, has_log_probs)
        if not is_stream:
            answers = await service.answers(ticket)
            return await service.rendered(ticket.client, reply.whole(answers, ticket.num_prompt_tokens), headers)
        has_usage = bool((reading.fields["stream_options"] or {}).get("include_usage"))
        if options.num_beams > 1 or options.num_return > 1:
            # The best one is only known when all are finished, so each is sent as a whole.
            answers = await service.answers(ticket)
            events = reply.chunks_of(answers, ticket.num_prompt_tokens, has_usage)
            return EventStream(events, headers)
        pieces, ticket = await service.stream(request, ticket)
        events = reply.chunks(pieces, ticket.num_prompt_tokens, has_usage)
        return EventStream(events, headers, on_end=lambda: service.cancel(ticket))

    @routes.post("/embeddings", openapi_extra=body_of("/v1/embeddings"))
    async def embeddings(request: Request) -> Response:
        """The unit vector of each text. Extension: for an image, all its vectors (see ``shape``); the
        cosine of image and text is the maximum over them."""
        matcher, cache = service.matcher, service.features
        async with service.readings.read(request) as reading:
            body = EmbeddingsRequest.model_construct(**reading.fields)
            name = names.matching(body.model)
            items: list[str | None] = reading.fields["input"]
            width = matcher.model.config.projection_size
            if body.dimensions not in (None, width):
                raise ApiError(400, "invalid_value", f"the vectors of {name} have {width} numbers", param="dimensions")
            texts = [item for item in items if item is not None]
            longest = max(map(len, texts), default=0)
            each = (matcher.reader.ids([text])[0] for text in texts)
            ids = await service.in_thread(reading.client, each, is_small=longest <= LONG_TEXT)
            looks = [await reading.look(place, cache) for place in range(reading.num_images)]

        def embed() -> Steps[tuple[list[torch.Tensor], list[torch.Tensor]]]:
            of_images = []
            for look in looks:
                [kept] = cache.see([look])
                if isinstance(kept, Exception):
                    raise kept
                of_images.append(kept.vectors_QE.float().cpu())
                yield
            of_texts: list[torch.Tensor] = []
            if ids:
                vectors_ME = yield from matcher.reader.embedding_texts(ids)
                of_texts = list(vectors_ME.float().cpu())
            return of_texts, of_images

        of_texts, of_images = await service.compute(reading.client, embed())
        next_text, next_image = iter(of_texts), iter(of_images)
        vectors = [next(next_image) if item is None else next(next_text) for item in items]

        def encoded() -> Iterator[bytes]:
            yield b'{"object":"list","data":['
            for index, vector in enumerate(vectors):
                yield f"{',' * (index > 0)}{packed(_embedding(index, vector, body.encoding_format))}".encode()
            num_tokens = sum(map(len, ids))
            usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
            yield f"],{packed({'model': name, 'usage': usage})[1:]}".encode()

        return await service.rendered(reading.client, encoded(), ignored(reading.fields))

    return routes


def ignored(fields: dict[str, Any]) -> dict[str, str]:
    """The header that reports ignored fields."""
    return {"X-Blip2-Ignored": ", ".join(fields["ignored"])} if fields["ignored"] else {}


def prompt_of(
    speaker: Speaker, history: Sequence[tuple[str, str]], question: str, options: GenerateOptions, limits: Limits
) -> tuple[str, GenerateOptions, int]:
    """The text of the prompt, the options with the number of tokens that the context has left, and the number of oldest
    turns that are dropped.

    Turns are dropped to leave space for an answer of a chat's length, not for the thousands of tokens that programs
    set.
    """
    [text], num_forgotten = caption.prompts(speaker, [""]), 0
    if history:
        kept = max(min(options.max_new_tokens, CHAT.max_new_tokens), options.min_new_tokens)
        text, num_forgotten = prompt_that_fits(speaker, history, question, kept)
    elif question:
        [text] = ask.prompts(speaker, [question])
    return text, fitting(speaker, text, options, limits), num_forgotten


def check_log_probs(body: ChatRequest, options: GenerateOptions) -> None:
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "invalid_value", "top_logprobs needs logprobs; set it to true", param="top_logprobs")
    if body.logprobs and options.num_beams > 1:
        raise ApiError(
            400, "invalid_value", "logprobs are not available with beam search; leave out num_beams "
            "and n, or logprobs",
            param="logprobs",
        )  # fmt: skip
    number = options.num_return * options.max_new_tokens * (1 + (body.top_logprobs or 0))
    if body.logprobs and number > MAX_LOG_PROBS:
        raise ApiError(
            400, "too_many_logprobs", f"the answer may have {number:,} log-probabilities (n times max_tokens times 1 + "
            f"top_logprobs); the limit is {MAX_LOG_PROBS:,}; request fewer",
            param="top_logprobs",
        )  # fmt: skip


def _embedding(index: int, vector: torch.Tensor, encoding: str) -> dict[str, Any]:
    flat = vector.flatten().contiguous()
    packed: Any = flat.tolist()
    if encoding == "base64":
        packed = base64.b64encode(flat.numpy().astype("<f4").tobytes()).decode()
    shape = {"shape": list(vector.shape)} if vector.ndim > 1 else {}
    return {"object": "embedding", "index": index, "embedding": packed, **shape}
