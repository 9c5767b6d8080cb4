"""``/v1``: what OpenAI's clients speak."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from blip2.generation import GenerateOptions
from blip2.serve.attention import Attended
from blip2.serve.decoding import fitting, options_of
from blip2.serve.described import body_of
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.names import Names
from blip2.serve.reply import EventStream, Reply
from blip2.serve.schemas import ChatRequest, EmbeddingsRequest
from blip2.serve.service import Service
from blip2.serve.worker import Ticket
from blip2.tasks import ask
from blip2.tasks.chat import prompt_that_fits
from blip2.tasks.defaults import ASK, CAPTION, CHAT
from blip2.tasks.speaker import Speaker


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
        """An answer about a picture. A question is answered as `Pipeline.ask` answers it, a picture without text gets
        its caption, several turns are a `Chat`; streamed, or with logprobs, greedily."""
        async with service.readings.read(request) as reading:
            body = ChatRequest.model_construct(**reading.fields)
            name = names.generative(body.model)
            history, question = reading.fields["history"], reading.fields["question"]
            is_stream, has_log_probs = bool(body.stream), bool(body.logprobs)
            options = options_of(
                body,
                CHAT if history else ASK if question else CAPTION,
                service.limits,
                is_followed=is_stream or has_log_probs,
            )
            check_log_probs(body, options)
            pipeline = service.pipeline
            text, options, num_forgotten = await asyncio.to_thread(
                prompt_of, pipeline.speaker, history, question, options, service.limits
            )
            ticket = Ticket(await reading.look(0, service.worker.images), text, options, num_top=body.top_logprobs or 0)
        headers = ignored(reading.fields)
        if num_forgotten:
            headers["X-Blip2-Forgotten-Turns"] = str(num_forgotten)
        reply = Reply(name, pipeline.speaker.tokenizer, has_log_probs)
        if not is_stream:
            answers = await service.answers(ticket)
            return JSONResponse(reply.whole(answers, ticket.num_prompt_tokens), headers=headers)
        has_usage = bool((reading.fields["stream_options"] or {}).get("include_usage"))
        if options.num_beams > 1 or options.num_return > 1:
            # Which is best is known only when all are there, so each comes in one piece.
            answers = await service.answers(ticket)
            events = reply.chunks_of(answers, ticket.num_prompt_tokens, has_usage)
            return EventStream(events, headers)
        pieces, ticket = await service.stream(request, ticket)
        events = reply.chunks(pieces, ticket.num_prompt_tokens, has_usage)
        return EventStream(events, headers, on_end=lambda: service.cancel(ticket))

    @routes.post("/embeddings", openapi_extra=body_of("/v1/embeddings"))
    async def embeddings(request: Request, response: Response) -> dict[str, Any]:
        """The unit vector of each text. An extension: of a picture, its vectors one after the other (see ``shape``);
        a text is as near to it as to the nearest of them."""
        matcher, cache = service.matcher, service.features
        async with service.readings.read(request) as reading:
            body = EmbeddingsRequest.model_construct(**reading.fields)
            name = names.matching(body.model)
            response.headers.update(ignored(reading.fields))
            items: list[str | None] = reading.fields["input"]
            width = matcher.model.config.projection_size
            if body.dimensions not in (None, width):
                raise ApiError(400, "invalid_value", f"the vectors of {name} have {width} numbers", param="dimensions")
            texts = [item for item in items if item is not None]
            ids = await asyncio.to_thread(matcher.reader.ids, texts) if texts else []
            looks = [await reading.look(place, cache) for place in range(reading.num_pictures)]

        def embed() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            of_texts = list(matcher.reader.embed_texts(ids).float().cpu()) if ids else []
            of_images = []
            for kept in cache.see(looks):
                if isinstance(kept, Exception):
                    raise kept
                of_images.append(kept.vectors_QE.float().cpu())
            return of_texts, of_images

        of_texts, of_images = await service.compute(embed)
        next_text, next_image = iter(of_texts), iter(of_images)
        vectors = [next(next_image) if item is None else next(next_text) for item in items]
        num_tokens = sum(map(len, ids))
        return {
            "object": "list",
            "data": [_embedding(index, vector, body.encoding_format) for index, vector in enumerate(vectors)],
            "model": name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }

    return routes


def ignored(fields: dict[str, Any]) -> dict[str, str]:
    """The header that tells what was passed over."""
    return {"X-Blip2-Ignored": ", ".join(fields["ignored"])} if fields["ignored"] else {}


def prompt_of(
    speaker: Speaker, history: Sequence[tuple[str, str]], question: str, options: GenerateOptions, limits: Limits
) -> tuple[str, GenerateOptions, int]:
    """The words that the language model is given, the options with the tokens that it has room for beside them, and
    how many of the oldest turns are left out.

    Turns make room for an answer as chats have it, and not for the thousands of tokens that programs allow for.
    """
    text, num_forgotten = "", 0
    if history:
        kept = max(min(options.max_new_tokens, CHAT.max_new_tokens), options.min_new_tokens)
        text, num_forgotten = prompt_that_fits(speaker, history, question, kept)
    elif question:
        [text] = ask.prompts(speaker, [question])
    return text, fitting(speaker, text, options, limits), num_forgotten


def check_log_probs(body: ChatRequest, options: GenerateOptions) -> None:
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "invalid_value", "top_logprobs come with logprobs; set it true", param="top_logprobs")
    if body.logprobs and options.num_beams > 1:
        raise ApiError(
            400, "invalid_value", "logprobs go with one token at a time, not with a search; leave out num_beams "
            "and n, or logprobs",
            param="logprobs",
        )  # fmt: skip


def _embedding(index: int, vector: torch.Tensor, encoding: str) -> dict[str, Any]:
    flat = vector.flatten().contiguous()
    packed: Any = flat.tolist()
    if encoding == "base64":
        packed = base64.b64encode(flat.numpy().astype("<f4").tobytes()).decode()
    shape = {"shape": list(vector.shape)} if vector.ndim > 1 else {}
    return {"object": "embedding", "index": index, "embedding": packed, **shape}
