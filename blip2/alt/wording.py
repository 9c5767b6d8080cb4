"""From a caption to an alt text: a pure function of texts."""

from __future__ import annotations

import re

from blip2.collection.record import Record
from blip2.collection.run import Outcome
from blip2.collection.wording import clean, shortened, tidy, without_repeats

MAX_CHARS = 125
"""Maximum length: screen readers read an alt text without a pause, and guides and linters have this limit."""

# Screen readers say "image" themselves. "Painting" and "drawing" are information and stay.
OPENING = re.compile(
    r"(?:(?:this|here|there) (?:is|are) |this )?(?:(?:an?|the|some|two|close[- ]?up|stock|color|colou?r|old) )*"
    r"(?:images?|pictures?|photos?|photographs?|pics?)(?: (?:of|showing|shows|depicting|depicts|with|that shows"
    r"|containing|contains))\b[ :]*",
    re.IGNORECASE,
)
DANGLING = re.compile(
    r"(?: (?:an?|the|and|or|of|in|on|at|by|to|with|for|from|near|next|that|which|is|are))+$", re.IGNORECASE
)


def alt_text(caption: str) -> str:
    """One line of at most `MAX_CHARS` characters, "" if nothing is left."""
    text = without_repeats(tidy(clean(caption)))
    while (opening := OPENING.match(text)) is not None:
        text = text[opening.end() :]
    if len(text) > MAX_CHARS:
        text = DANGLING.sub("", shortened(text, MAX_CHARS))
    return text[:1].upper() + text[1:]


def word(record: Record, outcome: Outcome) -> str:
    """For `Job.word`: from the first caption that is not empty afterwards."""
    return next(filter(None, map(alt_text, outcome.captions)), "")
