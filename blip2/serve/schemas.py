"""What clients send. Fields that are not here are ignored, as clients send many; see `openai.check` for those that
would change what an answer means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _no_bool(value: Any) -> Any:
    """For Python true is 1, and 1 token is not what anybody meant by it."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a number, not true or false")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(max_length=100_000)]
ImageText = Annotated[str, Field(min_length=1, description="data:image/...;base64,..., or plain base64")]

FIRST_ERROR = Field(fail_fast=True)
"""For lists: a body has room for millions of items, and to tell what is wrong with each of them takes gigabytes."""


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


class Decoding(Body):
    """How answers are written. What is not given is as the model's own task has it."""

    num_beams: Annotated[Whole, Field(ge=1)] | None = None
    length_penalty: Annotated[Number, Field(ge=-10, le=10)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    min_new_tokens: Annotated[Whole, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=100)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=16)]
        | None
    ) = None
    seed: Seed | None = None


# ---- OpenAI ----


class ImageUrl(Body):
    url: Annotated[str, Field(min_length=1)]


class Part(Body):
    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], FIRST_ERROR] | None = None


class StreamOptions(Body):
    include_usage: bool = False


class ChatRequest(Decoding):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2000), FIRST_ERROR]
    model: str | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    # These are known only to be refused where they ask for something:
    tools: Any = None
    functions: Any = None
    tool_choice: Any = None
    response_format: Any = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: Any = None
    modalities: Any = None


class EmbeddingImage(Body):
    """An extension: a picture among the texts."""

    image: ImageText


class EmbeddingsRequest(Body):
    """POST /v1/embeddings"""

    input: Text | EmbeddingImage | Annotated[list[Text | EmbeddingImage], Field(min_length=1), FIRST_ERROR]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Whole | None = None


# ---- plain ----


class CaptionRequest(Decoding):
    """POST /caption"""

    image: ImageText
    prompt: Text = ""


class AskRequest(Decoding):
    """POST /ask"""

    image: ImageText
    question: Text


class MatchRequest(Body):
    """POST /match"""

    image: ImageText
    texts: Annotated[list[Text], Field(min_length=1), FIRST_ERROR]


class ExplainRequest(Body):
    """POST /explain: where the picture speaks for ``text`` (by the matching model), or for the answer to ``question``,
    or for ``word`` of ``caption``, or all of it; what is not given of these is the model's own."""

    image: ImageText
    text: Text | None = None
    question: Text | None = None
    answer: Text | None = None
    word: Text | None = None
    caption: Text | None = None


class Answered(BaseModel):
    """What /caption and /ask give: the best answer, and all of them if more were asked for."""

    text: str
    texts: list[str]
    finish_reason: str
    model: str


class MatchedText(BaseModel):
    """Each number is from 0 to 1 but for the cosine, which is from -1; see `Matches`."""

    text: str
    itm_probability: float
    itc_cosine: float
    itc_probability: float | None


class Matched(BaseModel):
    """What /match gives: the texts in the order in which they were given."""

    results: list[MatchedText]
    model: str


class Explained(BaseModel):
    """What /explain gives; see `Explanation`."""

    text: str
    score: float
    strongest: tuple[float, float] | None
    """The place that speaks for it most, as shares of width and height; None if none does."""
    heat: str
    """A map of the picture, at most 512 pixels a side: a grey PNG in a data address, white where it speaks most."""
    model: str
