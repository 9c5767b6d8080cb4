"""Request schemas, with the names used here; see `dialect` for all other names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

BRANCH = "~"
"""Prefix of the names of a union's branches, which messages leave out."""


MAX_SPLIT = 100_000
"""Maximum texts in a comma-separated value; more are too many anyway."""


def _no_bool(value: Any) -> Any:
    """Rejects booleans: for Python true is 1, and nobody means 1 token by it."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "give a number, not true or false")
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _split(value: Any) -> Any:
    """Splits a,b,c as on the command line."""
    return value.split(",", MAX_SPLIT) if isinstance(value, str) else value


def _no_tokens(value: Any) -> Any:
    """Rejects token ids in place of texts, which LangChain sends by default."""
    first = value[0] if isinstance(value, list) and value else None
    first = first[0] if isinstance(first, list) and first else first
    if isinstance(first, int) and not isinstance(first, bool):
        raise PydanticCustomError(
            "token_ids", "these are token ids of another model's tokenizer; send the texts instead (LangChain: "
            "OpenAIEmbeddings(check_embedding_ctx_length=False))"
        )  # fmt: skip
    return value


def _kind(value: Any) -> str | None:
    """The branch of a union, by the JSON type."""
    kinds = ((str, "text"), (list, "list"), (dict | BaseModel, "object"))
    return next((BRANCH + name for kind, name in kinds if isinstance(value, kind)), None)


def _kinds(remedy: str) -> Discriminator:
    """A union of which only the branch of that JSON type is tried, so that errors are about that branch."""
    return Discriminator(_kind, custom_error_type="kind", custom_error_message=remedy)


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[Whole, Field(ge=1)]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
Share = Annotated[Number, Field(ge=0, le=1)]
Text = Annotated[str, Field(max_length=100_000)]
ImageText = Annotated[
    str, Field(min_length=1, description="data:image/...;base64,..., or plain base64; or a URL, if the server "
               "downloads any")
]  # fmt: skip

FIRST_ERROR = Field(fail_fast=True)
"""Lists stop at the first error: a body may hold millions of items, and errors for all of them take gigabytes."""

StopText = Annotated[str, Field(min_length=1, max_length=100)]
Stop = Annotated[
    Annotated[StopText, Tag("~text")]
    | Annotated[list[StopText], Field(max_length=16), FIRST_ERROR, Tag("~list")],
    _kinds("give a text, or a list of texts"),
]  # fmt: skip


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


class Decoding(Body):
    """Decoding options. Missing fields and null mean the default of the model's task."""

    called: SkipJsonSchema[dict[str, str]] = {}
    """The caller's names of fields that he calls differently."""
    max_tokens: Count | None = Field(None, description="Maximum tokens; never above the server's limit, and "
                                     "finish_reason is 'length' where it ends it. -2, -1, 0: not given")  # fmt: skip
    min_new_tokens: Annotated[Whole, Field(ge=0)] | None = Field(None, description="Minimum tokens. -1: not given")
    n: Count | None = Field(None, description="Number of answers: the best beams, or as many samples")
    num_beams: Count | None = Field(None, description="Number of beams; 1 is greedy decoding")
    length_penalty: Annotated[Number, Field(ge=-10, le=10)] | None = Field(
        None, description="With beams: above 0 favours longer answers, below 0 shorter"
    )
    early_stopping: Annotated[
        Annotated[Literal["never"], Tag("~word")] | Annotated[bool, Tag("~bool")],
        Discriminator(lambda value: "~word" if value == "never" else "~bool"),
    ] | None = Field(None, description="When beams stop: true as soon as there are enough answers, false when no "
                     "better one is likely, never when none is possible")  # fmt: skip
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = Field(
        None, description="Above 1: makes tokens that already occur less likely. 0: not given"
    )
    no_repeat_ngram_size: Annotated[Whole, Field(ge=0)] | None = Field(
        None, description="Never repeat an n-gram of this size. -1, 0: not given"
    )
    stop: Stop | None = Field(None, description="Stop before any of these texts. Empty: not given")
    sample: bool | None = Field(None, description="Sample each token; any of the next five implies it")
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = Field(
        None, description="Below 1 is less random, above 1 more random; 0 is greedy decoding"
    )
    top_k: Annotated[Whole, Field(ge=0)] | None = Field(
        None, description="Sample from the k most likely tokens. -1, 0: not given"
    )
    top_p: Share | None = Field(
        None, description="Sample from the most likely tokens whose probabilities sum to this; 0 is greedy decoding, "
        "1 samples from all"
    )  # fmt: skip
    min_p: Share | None = Field(
        None, description="Sample from tokens at least this many times as likely as the most likely"
    )
    typical_p: Annotated[Number, Field(gt=0, le=1)] | None = Field(None, description="Typical decoding; 1: from all")
    seed: Seed | None = Field(None, description="The same seed, the same answer. -1: not given")


# ---- OpenAI ----


class ImageUrl(Body):
    url: Annotated[str, Field(min_length=1)]


Address = Annotated[
    Annotated[ImageUrl, Tag("~object")] | Annotated[str, Field(min_length=1), Tag("~text")],
    _kinds('give {"url": "data:image/...;base64,..."}'),
]


class Source(Body):
    """An image in the form of Anthropic's clients."""

    data: str | None = None
    url: str | None = None


class Part(Body):
    """``type`` is text or image_url; names of other clients are accepted, too."""

    type: str
    text: str | None = None
    image_url: Address | None = None
    image: str | None = None
    source: Source | None = None


Content = Annotated[
    Annotated[str, Tag("~text")] | Annotated[list[Part], FIRST_ERROR, Tag("~list")],
    _kinds("give a text, or a list of parts"),
]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    images: Annotated[list[str], FIRST_ERROR] | None = Field(None, description="Base64, as Ollama's clients send it")
    image: SkipJsonSchema[Any] = None
    image_url: SkipJsonSchema[Any] = None
    """Only accepted to be refused with a clear message."""


class StreamOptions(Body):
    include_usage: bool | None = None


class ChatRequest(Decoding):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2000), FIRST_ERROR]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None


class EmbeddingImage(Body):
    """An extension: an image among the texts."""

    image: ImageText


EmbeddingItem = Annotated[
    Annotated[Text, Tag("~text")] | Annotated[EmbeddingImage, Tag("~object")],
    _kinds('give a text, or {"image": "data:image/...;base64,..."}'),
]


class EmbeddingsRequest(Body):
    """POST /v1/embeddings"""

    input: Annotated[
        Annotated[Text, Tag("~text")]
        | Annotated[EmbeddingImage, Tag("~object")]
        | Annotated[list[EmbeddingItem], Field(min_length=1), FIRST_ERROR, Tag("~list")],
        _kinds("give a text, or a list of texts"),
        BeforeValidator(_no_tokens),
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Whole | None = None


# ---- plain ----


class CaptionRequest(Decoding):
    """POST /caption"""

    image: ImageText
    prompt: Text = Field("", description="Text that the caption continues; it is not repeated")


class AskRequest(Decoding):
    """POST /ask"""

    image: ImageText
    question: Text
    choices: Annotated[list[Text], FIRST_ERROR, BeforeValidator(_split)] | None = Field(
        None, description="Choose the most likely of these answers: a list, or one comma-separated text. "
        "Excludes decoding options"
    )  # fmt: skip


class MatchRequest(Body):
    """POST /match"""

    image: ImageText
    texts: Annotated[list[Text], Field(min_length=1), FIRST_ERROR, BeforeValidator(_listed)]


class ExplainRequest(Body):
    """POST /explain: the image regions that support ``text`` (matching model), the answer to ``question``, or ``word``
    of ``caption`` or all of it; a missing answer or caption is generated."""

    image: ImageText
    text: Text | None = None
    question: Text | None = None
    answer: Text | None = None
    word: Text | None = None
    caption: Text | None = None


SCHEMAS: dict[str, type[Body]] = {
    "/caption": CaptionRequest,
    "/ask": AskRequest,
    "/match": MatchRequest,
    "/explain": ExplainRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingsRequest,
}


# ---- answers ----


class Chosen(BaseModel):
    """One of the choices: ``score``, its log-probability; ``probability``, its share among the choices, 0 to 1."""

    text: str
    score: float
    probability: float


class Answered(BaseModel):
    """The response of /caption and /ask: the best answer, and all answers if several were requested, best first.

    ``finish_reason``: "eos", "stop" (a stop text), "length" (the maximum number of tokens), or "choice" if the answer
    is one of the choices; then ``choices`` lists them, most likely first.
    """

    text: str
    texts: list[str]
    finish_reason: str
    model: str
    choices: list[Chosen] | None = None


class MatchedText(BaseModel):
    """Each number is from 0 to 1, except the cosine, which is from -1; see `Matches`."""

    text: str
    itm_probability: float
    itc_cosine: float
    itc_probability: float | None


class Matched(BaseModel):
    """The response of /match: the texts in the order of the request."""

    results: list[MatchedText]
    model: str


class Explained(BaseModel):
    """The response of /explain; see `Explanation`."""

    text: str
    score: float
    strongest: tuple[float, float] | None
    """The strongest point, as fractions of width and height; None if there is none."""
    heat: str
    """The map, at most 512 pixels per side: a grey PNG as a data URL, white where the map is strongest."""
    model: str
