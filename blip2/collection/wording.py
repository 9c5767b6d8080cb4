"""From generated captions to the lines of the outputs: a pure function of texts."""

from __future__ import annotations

import os
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import Literal, get_args

from blip2.collection.patterns import check_patterns
from blip2.collection.record import Record
from blip2.collection.run import Outcome
from blip2.errors import OptionError, option

FIELDS = ("caption", "name", "folder", "concept", "old")
IfExists = Literal["skip", "overwrite", "append", "prepend"]
EDGES = " ,;"


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How captions are worded. Raises OptionError at once for invalid options.

    Steps, in this order: repeated words at the end are cut (``dedupe_words``); each of ``replace`` (old, new) and
    ``remove`` (regular expressions) is applied; of several captions those without ``forbid_words`` come first, and the
    words are removed from the others (whole words, any case); ``template``, ``prefix`` and ``suffix`` are added
    unchanged, without blanks; the caption alone is cut to ``max_chars``, at a word boundary if there is one.
    ``if_exists`` "append" and "prepend" put the line after or before the existing text, with ``separator``, unless it
    is already there.

    A line has no line breaks or control characters, and is in NFC. If no caption is left, there is no line.
    """

    prefix: str = ""
    suffix: str = ""
    template: str = "{caption}"
    replace: Sequence[tuple[str, str]] = ()
    remove: Sequence[str] = ()
    forbid_words: Sequence[str] = ()
    dedupe_words: bool = False
    max_chars: int | None = None
    if_exists: IfExists = "skip"
    separator: str = ", "
    pieces: Sequence[tuple[str, str]] = field(init=False, repr=False, compare=False)
    """The template as pairs of a literal text and the field that follows it ("" at the end)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", _pieces(self.template))
        check_patterns(self.remove)
        if self.if_exists not in get_args(IfExists):
            known = ", ".join(get_args(IfExists))
            raise OptionError(f"{option('if_exists')} is {self.if_exists!r}; use {known}")
        if any(not old for old, _ in self.replace):
            raise OptionError(f"{option('replace')} has an empty text to replace; give OLD=NEW")
        if any(not word.strip() for word in self.forbid_words):
            raise OptionError(f"{option('forbid_words')} has an empty word; remove it")
        fixed = len(self.prefix + self.suffix) + sum(len(text) for text, _ in self.pieces)
        if self.max_chars is not None and self.max_chars <= fixed:
            raise OptionError(
                f"{option('max_chars')} is {self.max_chars}, which leaves no space for a caption beside the {fixed} "
                "characters of prefix, suffix and template; raise it, or shorten these"
            )

    def __call__(self, record: Record, outcome: Outcome) -> str:
        """`lines` as one text, for `Job.word`."""
        return "\n".join(self.lines(record, outcome.captions))

    def lines(self, record: Record, captions: Sequence[str]) -> list[str]:
        """The lines of an image, best caption first, without duplicates; empty if no caption is left."""
        found = dict.fromkeys(
            line for caption in self._chosen(captions) if (line := self._line(record, caption)) is not None
        )
        if self.if_exists == "overwrite" or self.if_exists == "skip" or not found:
            return [*found]
        old = [line for part in record.text.split("\n") if (line := clean(part).strip())]
        return [*dict.fromkeys(self._joined(old, [*found]))]

    def _chosen(self, captions: Sequence[str]) -> list[str]:
        """The captions after editing; those without forbidden words first."""
        texts = [self._mended(caption) for caption in captions]
        sound = [text for text in texts if not self._forbidden.search(text)] if self.forbid_words else texts
        others = [tidy(self._forbidden.sub(" ", text)) for text in texts if text not in sound]
        return [text for text in sound + others if text.strip(EDGES + ".")]

    def _mended(self, caption: str) -> str:
        text = tidy(clean(caption))
        if self.dedupe_words:
            text = without_repeats(text)
        for old, new in self.replace:
            text = text.replace(clean(old), clean(new))
        for pattern in self.remove:
            text = tidy(re.sub(pattern, "", text))
        return tidy(text)

    @cached_property
    def _forbidden(self) -> re.Pattern[str]:
        words = sorted((clean(word).strip() for word in self.forbid_words), key=len, reverse=True)
        return re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in words), re.IGNORECASE)

    def _line(self, record: Record, caption: str) -> str | None:
        """The line; None if there is no space for a caption."""
        values = {**about(record), "old": " ".join(clean(record.text).split())}
        line = self._filled(values, caption)
        if self.max_chars is None or len(line) <= self.max_chars:
            return line
        num_captions = sum(name == "caption" for _, name in self.pieces)
        num_chars = (self.max_chars - len(self._filled(values, ""))) // num_captions
        cut = shortened(caption, num_chars)
        return self._filled(values, cut) if cut else None

    def _filled(self, values: dict[str, str], caption: str) -> str:
        filled = "".join(text + {**values, "caption": caption, "": ""}[name] for text, name in self.pieces)
        return clean(self.prefix + filled + self.suffix)

    def _joined(self, old: list[str], new: list[str]) -> Iterator[str]:
        separator = self.separator
        if not old:
            yield from new
        elif "\n" in separator:
            yield from old + new if self.if_exists == "append" else new + old
        else:
            for line in new:
                for before in old:
                    if separator + line + separator in separator + before + separator:
                        yield before  # written by an earlier run
                    else:
                        both = (before, line) if self.if_exists == "append" else (line, before)
                        yield clean(separator.join(both))


def about(record: Record) -> dict[str, str]:
    """The template fields of an image's path: ``name`` without suffix, ``folder``, and ``concept``: the folder without
    the number of repeats that trainers put before it, "10_sks dog" -> "sks dog"."""
    path = PurePath(record.key)
    if path.parent.name in ("", "..") and PurePath(record.name).name == path.name:  # is in the source's root
        path = PurePath(os.path.abspath(record.name))
    # The key of a shard has no suffix, but its folders may contain dots.
    name = path.stem if re.fullmatch(r"\.[A-Za-z]\w{1,4}", path.suffix) else path.name
    folder = path.parent.name
    found = {"name": name, "folder": folder, "concept": re.sub(r"^\d+_(?=.)", "", folder)}
    return {field: clean(text) for field, text in found.items()}


def clean(text: str) -> str:
    """The text in NFC on one line: control characters and line breaks become blanks, invalid Unicode becomes U+FFFD."""
    text = "".join(_CLEAN.get(unicodedata.category(character), character) for character in text)
    return unicodedata.normalize("NFC", text.replace("\ufeff", ""))


_CLEAN = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": "\ufffd"}


def tidy(text: str) -> str:
    """Single blanks, none before a comma or full stop, no comma at either end."""
    text = " ".join(text.split())
    text = re.sub(r"(?:[,;] ?)+([,;.])", r"\1", re.sub(r" ([,.;:!?](?!\w))", r"\1", text))
    return text.strip().lstrip(EDGES).rstrip(EDGES)


def without_repeats(text: str) -> str:
    """The text with a repeated end reduced to one repetition: "a dog a dog a dog" -> "a dog".

    A single word counts as repeated from three times on ("Bora Bora" does not), longer phrases from two.
    """
    words = text.split()
    while (end := _first_round(words)) is not None:
        words = words[:end]
    return " ".join(words).rstrip(EDGES)


def _first_round(words: list[str]) -> int | None:
    folded = [word.strip(",;.").casefold() for word in words]
    for period in range(1, len(folded) // 2 + 1):
        start = len(folded) - period
        while start > 0 and folded[start - 1] == folded[start - 1 + period]:
            start -= 1
        length = len(folded) - start
        if length >= period * (3 if period == 1 else 2):
            rest = length % period
            # "a man and a man and a man": the word that joins the repetitions is dropped after the last.
            return start + (rest if rest * 2 > period else period)
    return None


def shortened(text: str, max_chars: int) -> str:
    """At most ``max_chars`` characters, cut before a word; within the first word if that is longer."""
    if len(text) <= max_chars:
        return text
    kept = text[: max(max_chars, 0) + 1]
    at_word = kept.rpartition(" ")[0].rstrip(EDGES)
    if at_word:
        return at_word
    end = max(max_chars, 0)
    while end > 0 and unicodedata.combining(text[end]):  # an accent belongs to the character before it
        end -= 1
    return text[:end]


def _pieces(template: str) -> list[tuple[str, str]]:
    known = " ".join(f"{{{name}}}" for name in FIELDS)
    found = []
    try:
        for text, name, spec, conversion in string.Formatter().parse(template):
            if name is not None and (name not in FIELDS or spec or conversion):
                written = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                raise OptionError(
                    f"{option('template')} has {{{written}}}, an unknown field; use {known}, and {{{{ and }}}} "
                    "for braces"
                )
            found.append((text, name or ""))
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(
            f"{option('template')} is {template!r}: {error}; use {known}, and {{{{ and }}}} for braces"
        ) from None
    if "caption" not in [name for _, name in found]:
        raise OptionError(f"{option('template')} is {template!r}, without {{caption}}; add it where the caption goes")
    return found
