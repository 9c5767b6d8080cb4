"""``/caption``, ``/ask``, ``/match``, ``/explain``: one task each, for forms with a file or JSON."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from blip2.api import Matcher
from blip2.generation import GenerateOptions
from blip2.image import grey_address
from blip2.serve.attention import Attended
from blip2.serve.body import TEXTS
from blip2.serve.choosing import choosing, chosen
from blip2.serve.decoding import check_prompt, fitting, options_of
from blip2.serve.described import body_of
from blip2.serve.errors import ApiError
from blip2.serve.names import served_name
from blip2.serve.reading import Reading
from blip2.serve.reply import packed
from blip2.serve.schemas import (
    Answered,
    AskRequest,
    CaptionRequest,
    Decoding,
    Explained,
    Matched,
    MatchedText,
    MatchRequest,
)
from blip2.serve.service import Service
from blip2.serve.tickets import Steps, Ticket
from blip2.tasks import ask as ask_task
from blip2.tasks import caption as caption_task
from blip2.tasks.explain import Explanation, ImagePatches, Words, explaining_match, explaining_words
from blip2.tasks.match import Matches
from blip2.text import LONG_TEXT

MAP_PX = 512
"""The longer side of the map that /explain returns, in pixels."""


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=Attended)

    async def ticket(reading: Reading, body: Decoding, text: str, defaults: GenerateOptions) -> Ticket:
        options = options_of(body, defaults, service.limits)
        work = partial(fitting, service.pipeline.speaker, text, options, service.limits)
        options = await service.read_text(reading.client, text, work)
        look = await reading.look(0, service.worker.images)
        return Ticket(look, text, options, client=reading.client)

    async def answered(asked: Ticket) -> Response:
        answers = await service.answers(asked)
        pipeline = service.pipeline
        decoded = (pipeline.speaker.tokenizer.decode(each.tokens) for each in answers)
        texts = await service.in_thread(asked.client, decoded)
        reason, name = answers[0].finish_reason, served_name(pipeline.name)
        return _json(Answered(text=texts[0], texts=texts, finish_reason=reason, model=name), exclude_none=True)

    @routes.post("/caption", response_model=Answered, openapi_extra=body_of("/caption"))
    async def caption(request: Request) -> Response:
        """Generate a caption; ``prompt`` is text that the caption continues."""
        async with service.readings.read(request) as reading:
            body = CaptionRequest.model_construct(**reading.fields)
            [text] = caption_task.prompts(service.pipeline.speaker, [body.prompt])
            asked = await ticket(reading, body, text, service.pipeline.speaker.defaults.caption)
        return await answered(asked)

    @routes.post("/ask", response_model=Answered, openapi_extra=body_of("/ask"))
    async def ask(request: Request) -> Response:
        """Answer a question about an image, freely or with one of ``choices``."""
        async with service.readings.read(request) as reading:
            body = AskRequest.model_construct(**reading.fields)
            [text] = ask_task.prompts(service.pipeline.speaker, [body.question])
            if body.choices is None:
                asked = await ticket(reading, body, text, service.pipeline.speaker.defaults.ask)
            else:
                question = await choosing(service, reading, body, text)
        if body.choices is None:
            return await answered(asked)
        return _json(await chosen(service, question))

    @routes.post("/match", response_model=Matched, openapi_extra=body_of("/match"))
    async def match(request: Request) -> Response:
        """Score how well texts match an image."""
        matcher, cache = service.matcher, service.features
        async with service.readings.read(request) as reading:
            body = MatchRequest.model_construct(**reading.fields)
            longest = max(map(len, body.texts))
            each = (matcher.reader.ids([text])[0] for text in body.texts)
            ids = await service.in_thread(reading.client, each, is_small=longest <= LONG_TEXT)
            seen = await reading.look(0, cache)

        def compare() -> Steps[Matches]:
            [kept] = cache.see([seen])
            if isinstance(kept, Exception):
                raise kept
            yield
            return (yield from matcher.reader.comparing(kept, ids))

        found = await service.compute(reading.client, compare())
        matching, cosines = found.itm_probability[0].tolist(), found.itc_cosine[0].tolist()
        shares = [None] * len(ids) if found.itc_probability is None else found.itc_probability[0].tolist()

        def pieces() -> Iterator[bytes]:
            yield b'{"results":['
            for place, (text, *numbers) in enumerate(zip(body.texts, matching, cosines, shares, strict=True)):
                result = dict(zip(MatchedText.model_fields, (text, *numbers), strict=True))
                yield f"{',' * (place > 0)}{packed(result)}".encode()
            yield f"],{packed({'model': served_name(matcher.name)})[1:]}".encode()

        return await service.rendered(reading.client, pieces())

    @routes.post("/explain", response_model=Explained, openapi_extra=body_of("/explain"))
    async def explain(request: Request) -> Response:
        """A heat map of the image regions that a text, an answer or a word of a caption comes from."""
        async with service.readings.read(request) as reading:
            given = {name: text for name, text in reading.fields.items() if text is not None}
            text = given.pop("text", None)
            words = Words(**given)
            words.check()
            if text is not None and given:
                raise ApiError(400, "invalid_value", f"a text is explained alone; leave out {next(iter(given))}")
            model = service.pipeline if text is None else service.matcher
            given_text = " ".join(reading.fields.get(name) or "" for name in TEXTS)
            await service.read_text(reading.client, given_text, lambda: check(text, words))
            small, pixels_CHW = await reading.shown(0, model.frontend, MAP_PX)

        def look_closely() -> Steps[Explanation]:
            encode = model.model.encode if isinstance(model, Matcher) else model.speaker.model.patches
            seen = ImagePatches(small, *model.frontend.with_blank(pixels_CHW, encode), model.frontend.box(small))
            yield
            if isinstance(model, Matcher):
                assert text is not None
                return (yield from explaining_match(model.reader, seen, text))
            return (yield from explaining_words(model.speaker, seen, words))

        found = await service.compute(reading.client, look_closely())

        def responses() -> Iterator[Response]:
            place = found.strongest
            yield _json(
                Explained(
                    text=found.text,
                    score=found.score,
                    strongest=None if place is None else (place[0] / small.width, place[1] / small.height),
                    heat=grey_address(found.heat.numpy()),
                    model=served_name(model.name),
                )
            )

        [response] = await service.in_thread(reading.client, responses(), is_small=False)
        return response

    def check(text: str | None, words: Words) -> None:
        """Check that the texts to explain are short enough. Raises ApiError and OptionError."""
        if text is not None:
            service.matcher.reader.ids([text])
            return
        speaker, most = service.pipeline.speaker, service.limits.max_new_tokens
        check_prompt(speaker, words.question or "", service.limits)
        for name, text_given in (("answer", words.answer), ("caption", words.caption)):
            number = len(speaker.tokenizer.encode(text_given or ""))
            if number > most:
                message = f"the {name} has {number} tokens; the limit is {most}; shorten it"
                raise ApiError(400, "prompt_too_long", message, param=name)

    return routes


def _json(content: BaseModel, *, exclude_none: bool = False) -> Response:
    return Response(content.model_dump_json(exclude_none=exclude_none), media_type="application/json")
