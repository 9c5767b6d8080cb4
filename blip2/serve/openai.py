"""``/v1``: what OpenAI's clients speak."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import torch
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from blip2.serve import conversation
from blip2.serve.decoding import check_prompt, checked_text, options_of
from blip2.serve.errors import ApiError
from blip2.serve.names import Names
from blip2.serve.reply import EventStream, Reply
from blip2.serve.schemas import ChatRequest, EmbeddingImage, EmbeddingsRequest
from blip2.serve.service import Service
from blip2.serve.worker import Ticket


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1")
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

    @routes.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        """An answer about a picture. A question is answered as `Pipeline.ask` answers it, a picture without text gets
        its caption, several turns are a `Chat`; streamed, or with logprobs, greedily."""
        check(body)
        name = names.generative(body.model)
        asked = conversation.read(body.messages, service.limits.max_images)
        is_stream, has_log_probs = bool(body.stream), bool(body.logprobs)
        options = options_of(
            body,
            asked.defaults,
            service.limits,
            max_new_tokens=body.max_completion_tokens,
            is_followed=is_stream or has_log_probs,
        )
        if body.top_logprobs and not has_log_probs:
            raise ApiError(400, "invalid_value", "top_logprobs come with logprobs; set it true", param="top_logprobs")
        if has_log_probs and options.num_beams > 1:
            raise ApiError(
                400, "invalid_value", "logprobs go with one token at a time, not with a search; leave out num_beams "
                "and n, or logprobs",
                param="logprobs",
            )  # fmt: skip
        checked_text(asked.question + "".join(f"{question} {said}" for question, said in asked.history), service.limits)
        pipeline = service.pipeline

        def prompt() -> tuple[str, int]:
            text, num_forgotten = asked.prompt(pipeline.speaker, options)
            check_prompt(pipeline.speaker, text, service.limits)
            return text, num_forgotten

        text, num_forgotten = await asyncio.to_thread(prompt)
        seen = await service.pictures.look(asked.image, service.worker.images)
        headers = {"X-Blip2-Forgotten-Turns": str(num_forgotten)} if num_forgotten else {}
        reply = Reply(name, pipeline.speaker.tokenizer, has_log_probs)
        ticket = Ticket(seen, text, options, num_top=body.top_logprobs or 0)
        if not is_stream:
            answers = await service.answers(request, ticket)
            return JSONResponse(reply.whole(answers, ticket.num_prompt_tokens), headers=headers)
        has_usage = body.stream_options is not None and body.stream_options.include_usage
        if options.num_beams > 1 or options.num_return > 1:
            # Which is best is known only when all are there, so each comes in one piece.
            answers = await service.answers(request, ticket)
            events = reply.chunks_of(answers, ticket.num_prompt_tokens, has_usage)
            return EventStream(events, headers)
        pieces, ticket = await service.stream(request, ticket)
        events = reply.chunks(pieces, ticket.num_prompt_tokens, has_usage)
        return EventStream(events, headers, on_end=lambda: service.worker.cancel(ticket))

    @routes.post("/embeddings")
    async def embeddings(request: Request, body: EmbeddingsRequest) -> dict[str, Any]:
        """The unit vector of each text. An extension: of a picture, its vectors one after the other (see ``shape``);
        a text is as near to it as to the nearest of them."""
        matcher = service.matcher
        name = names.matching(body.model)
        items = body.input if isinstance(body.input, list) else [body.input]
        images = [item.image for item in items if isinstance(item, EmbeddingImage)]
        texts = [item for item in items if isinstance(item, str)]
        if len(images) > service.limits.max_images:
            raise ApiError(400, "too_many_images", f"{len(images)} pictures; at most {service.limits.max_images}")
        if len(texts) > service.limits.max_texts:
            raise ApiError(400, "too_many_texts", f"{len(texts)} texts; at most {service.limits.max_texts} are read")
        width = matcher.model.config.projection_size
        if body.dimensions not in (None, width):
            raise ApiError(400, "invalid_value", f"the vectors of {name} have {width} numbers", param="dimensions")
        for text in texts:
            checked_text(text, service.limits)
        ids = matcher.reader.ids(texts) if texts else []
        cache = service.features
        looks = [await service.pictures.look(image, cache) for image in images]

        def embed() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            of_texts = list(matcher.reader.embed_texts(ids).float().cpu()) if ids else []
            of_images = []
            for kept in cache.see(looks):
                if isinstance(kept, Exception):
                    raise kept
                of_images.append(kept.vectors_QE.float().cpu())
            return of_texts, of_images

        of_texts, of_images = await service.compute(request, embed)
        next_text, next_image = iter(of_texts), iter(of_images)
        vectors = [next(next_text) if isinstance(item, str) else next(next_image) for item in items]
        num_tokens = sum(map(len, ids))
        return {
            "object": "list",
            "data": [_embedding(index, vector, body.encoding_format) for index, vector in enumerate(vectors)],
            "model": name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }

    return routes


def check(body: ChatRequest) -> None:
    """What would change the meaning of an answer, and cannot be done, is refused."""
    format_type = body.response_format.get("type") if isinstance(body.response_format, dict) else body.response_format
    problems = {
        "tools": bool(body.tools) and "this model calls no tools",
        "functions": bool(body.functions) and "this model calls no functions",
        "tool_choice": body.tool_choice not in (None, "none", "auto") and "this model calls no tools",
        "response_format": format_type not in (None, "text") and "this model writes plain text only",
        "frequency_penalty": bool(body.frequency_penalty) and "use repetition_penalty",
        "presence_penalty": bool(body.presence_penalty) and "use repetition_penalty",
        "logit_bias": bool(body.logit_bias) and "single tokens cannot be favoured",
        "modalities": body.modalities not in (None, ["text"]) and "this model writes plain text only",
    }
    for name, problem in problems.items():
        if problem:
            raise ApiError(400, "unsupported_parameter", f"{name} is not supported: {problem}", param=name)


def _embedding(index: int, vector: torch.Tensor, encoding: str) -> dict[str, Any]:
    flat = vector.flatten().contiguous()
    packed: Any = flat.tolist()
    if encoding == "base64":
        packed = base64.b64encode(flat.numpy().astype("<f4").tobytes()).decode()
    shape = {"shape": list(vector.shape)} if vector.ndim > 1 else {}
    return {"object": "embedding", "index": index, "embedding": packed, **shape}
