"""Questions about images: free answers, or the best of given answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from blip2.encoded import EncodedImage
from blip2.errors import OptionError
from blip2.generation import GenerateOptions
from blip2.tasks.defaults import BATCH_SIZE
from blip2.tasks.speaker import Answer, Speaker, check_batch_size, chunks, num_pairs, pairs
from blip2.text import checked_question, clean


@dataclass(frozen=True)
class Choice:
    """A given answer: ``score``, its log-probability; ``probability``, its share among the choices, 0 to 1."""

    text: str
    score: float
    probability: float


def ask(
    speaker: Speaker,
    images: Sequence[EncodedImage],
    questions: Sequence[str],
    *,
    options: GenerateOptions | None = None,
    batch_size: int = BATCH_SIZE,
    wording: str = "",
) -> list[list[Answer]]:
    """Answer N questions about N images, one about N, or N about one; ``options.num_return`` answers each.

    The model's prompt template is added here (`Speaker.question`); without ``options`` those of the model's authors
    apply. ``wording``: another template, such as "Question: {} Short answer:". Raises OptionError for an empty question
    and for numbers that do not pair up.
    """
    return speaker.answers(images, prompts(speaker, questions, wording), options or speaker.defaults.ask, batch_size)


def rank(
    speaker: Speaker,
    images: Sequence[EncodedImage],
    questions: Sequence[str],
    choices: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
) -> list[list[Choice]]:
    """The same choices for each pair of image and question, most likely first.

    The score is the log-probability of the whole answer and its end token. It is not divided by the length: the
    scores then belong to exclusive events ("yes" is not part of "yes, two"), so they can be normalised over the
    choices. Among choices of very different length the shorter ones have an advantage.

    Raises OptionError for fewer than two choices, empty or repeated ones.
    """
    number = num_pairs(len(images), len(questions))
    return rank_each(speaker, images, questions, [check_choices(choices)] * number, batch_size=batch_size)


def rank_each(
    speaker: Speaker,
    images: Sequence[EncodedImage],
    questions: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    batch_size: int = BATCH_SIZE,
    wording: str = "",
) -> list[list[Choice]]:
    """As `rank`, with choices for each pair. ``wording`` as in `ask`."""
    check_batch_size(batch_size)
    asked = pairs(images, prompts(speaker, questions, wording))
    own = [check_choices(some) for some in choices]
    jobs = [(image, text, choice) for (image, text), some in zip(asked, own, strict=True) for choice in some]
    scores: list[float] = []
    for batch in chunks(jobs, batch_size):
        scores += scored(speaker, batch)
    rest = iter(scores)
    return [ranking(some, [*islice(rest, len(some))]) for some in own]


def scored(speaker: Speaker, jobs: Sequence[tuple[EncodedImage, str, str]]) -> list[float]:
    """The log-probability of an answer, for each image, prompt (see `prompts`) and answer; computed as a batch."""
    answers = [speaker.answer_ids(answer) for *_, answer in jobs]
    longest: dict[tuple[int, str], int] = {}
    for (image, text, _), answer in zip(jobs, answers, strict=True):
        longest[id(image), text] = max(longest.get((id(image), text), 0), len(answer))
    asked = {(id(image), text): image for image, text, _ in jobs}  # each pair once, however many answers it has
    vectors = {key: speaker.prompt(image, key[1], longest[key]) for key, image in asked.items()}
    return speaker.engine.score([vectors[id(image), text] for image, text, _ in jobs], answers)


def check_choices(choices: Sequence[str]) -> list[str]:
    """The stripped choices; OptionError for fewer than two, empty or repeated ones."""
    if isinstance(choices, str):
        raise OptionError(f"the choices are a single text, {choices!r}; give a list, such as ['yes', 'no']")
    if not isinstance(choices, Iterable):
        raise OptionError(f"the choices are {choices!r}; give a list of texts, such as ['yes', 'no']")
    cleaned = [clean(choice) for choice in choices]
    if len(cleaned) < 2:
        number = "one choice is" if cleaned else "no choices are"
        raise OptionError(f"{number} too few; give at least two")
    if "" in cleaned:
        raise OptionError("one of the choices is empty; remove it")
    if repeated := sorted({choice for choice in cleaned if cleaned.count(choice) > 1}):
        raise OptionError(f"the choice {repeated[0]!r} occurs more than once; give each once")
    return cleaned


def prompts(speaker: Speaker, questions: Sequence[str], wording: str = "") -> list[str]:
    """The questions in the model's prompt template, or in another one; OptionError for an empty question."""
    if wording:
        return [wording.replace("{}", checked_question(question)) for question in questions]
    return [speaker.question(question) for question in questions]


def ranking(choices: Sequence[str], scores: Sequence[float]) -> list[Choice]:
    """The choices with their scores, most likely first."""
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    ranked = sorted(zip(scores, choices, weights, strict=True), key=lambda row: -row[0])
    return [Choice(text, score, weight / sum(weights)) for score, text, weight in ranked]
