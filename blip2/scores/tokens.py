"""Tokenization of captions as in ``coco-caption``: Stanford's PTBTokenizer without punctuation.

The rules cover what occurs in captions, not everything that the Java program does; the agreement by kind of text is
measured (`tests/scores/test_tokens.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
"""Dropped by the official program after lower-casing. Its list has brackets too, but by upper-case names, so they
remain as ``-lrb-``."""
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# Abbreviations keep their period. Those of the second list are also ordinary words in lower case.
ABBREVIATIONS = """
    adj adv al ala alex apr ariz assn assoc aug ave bldg blvd brig bros calif capt cf cmdr co col colo conn corp cpl
    ct dec dept det dr drs esq est etc ext feb fla fri ft ga gen gov hon inc ind jan jr jul jun kan ky lt ltd maj
    mar mich minn mo mon mont mr mrs ms mt neb nev nov oct okla ont penn ph plc pres prof pvt rd rep rev rt sen sep
    sept sgt sq sr st ste tel tenn thu thurs tue tues univ va vs vt wed wis wyo
"""
NAMES = "ark az del ill la mass md miss ore pa tex wash"
BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"


def _any(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


def _in_capitals(words: str) -> str:
    return "|".join(f"{word.capitalize()}|{word.upper()}" for word in words.split())


# A letter with a period before one of these ends a sentence; before another name it is an initial.
BEGINNINGS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once
    One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
"""

A = "['\u2019\u0092]"  # an apostrophe
LETTER = r"[^\W\d_]"
END = r"(?![^\W_])"
ENDING = rf"(?i:{A}(?:s|m|d|re|ve|ll){END})"
NOT = rf"(?i:n{A}t{END})"
PART = r"[^\W_](?:\w*[^\W_])?"
NUMBER = r"(?:\d+(?:[.,:]\d+)*|\.\d+)"

PATTERNS = [
    ("line", r"\n"),
    ("tag", r"</?[A-Za-z!][^<>\r\n]*>|<[\w.+-]+@(?:[\w-]+\.)+[A-Za-z]+>"),
    ("smiley", r"[<>]?[:;=][-o*']?[()\[\]]"),
    ("address", r"https?://[^\s<>\"]+[^\s<>\".,!?;:)'\]]|www\.[^\s<>\"]+[^\s<>\".,!?;:)'\]]"),
    ("mail", r"[\w.+-]+@(?:[\w-]+\.)+[A-Za-z]+"),
    ("handle", r"[@#][A-Za-z_]\w*"),
    ("entity", r"&(?:amp|lt|gt|quot|apos|nbsp);"),
    ("degree", r"(?i:ph\.d\.|m\.d\.)"),
    ("acronym", rf"(?<!\w)(?:{LETTER}\.){{2,}}(?!\w)|(?<!\w)(?:{LETTER}\.)+{LETTER}(?!\w)"),
    ("abbreviation", rf"(?<!\w)(?:(?i:{_any(ABBREVIATIONS)})|{_in_capitals(NAMES)})\.(?!\w)"),
    ("numbered", rf"(?<!\w)(?i:{_any(BEFORE_NUMBERS)})\.(?=:?\s+\d)"),
    ("initial", rf"(?<!\w){LETTER}\.(?!{LETTER}|\s+(?:{_any(BEGINNINGS)})(?:\s|$))"),
    ("split", r"(?<!\w)(?i:can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:lem|gim)(?=me\b))"),
    ("years", rf"{A}\d\d(?:s(?!\w)|(?=\s))"),
    ("and", rf"{A}n{A}(?!\d)"),
    ("was", rf"(?i:{A}t(?=is(?!\w)|was(?!\w)))"),
    ("shortened", rf"(?i:{A}(?:em|till?|cause|n)(?!\w))"),
    ("ending", ENDING),
    ("not", NOT),
    ("mixed", r"\d+[ \u00a0]\d+/\d+"),
    ("fraction", r"\d+(?:-\d+)?/\d+(?:/\d+)?"),
    ("signed", rf"(?<![\w.)-])[+-]{NUMBER}(?![\w-])"),
    ("one word", rf"(?<!\w)(?i:(?:o{A}clock|d{A}ye|ma{A}am|cap{A}n|c{A}mon)\b|c(?:\+\+|#)(?!\w))"),
    ("name", rf"(?<!\w)(?:[A-HJ-XZn]|[ldjo]){A}{LETTER}{{2,}}"),
    ("short", rf"(?<!\w)(?i:ol|somethin|dunkin|y){A}(?!(?:s|m|d|re|ve|ll)\b)"),
    ("with and", rf"{LETTER}+&{LETTER}(?!\w)|AT&T(?!\w)"),
    ("number", rf"(?>{NUMBER})(?![\w-])|(?>{NUMBER})(?=-+(?!\w))|\d+\.\d+(?={LETTER})"),
    ("before not", rf"{LETTER}+?(?={NOT})"),
    ("word", rf"(?:\d+(?:[.,]\d+)+(?=-{LETTER})|{PART})(?:[-/.]{PART})*"),
    ("dashes", r"-{2,}|[\u2013\u2014]+"),
    ("dots", r"\.{2,}|\u2026"),
    ("marks", r"[?!]{2,}|\*{2,}|#{2,}|<<|>>"),
    ("sign", r"[^\s\w\x00-\x1f\x7f-\x9f]|_+"),
]
SCANNER = re.compile("|".join(f"(?P<{name.replace(' ', '_')}>{pattern})" for name, pattern in PATTERNS))
NORMAL = {
    "\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3", "\u00a3": "#", "\u20ac": "$",
    "\u00a2": "cents", "\u2018": "`", "\u2019": "'", "\u201c": "``", "\u201d": "''", '"': "''", "&amp;": "&",
    "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "",
}  # fmt: skip
DROPPED_KINDS = {"dots", "dashes"}


def tokens(texts: Sequence[str]) -> list[list[str]]:
    """The tokens of each text, in lower case, without punctuation.

    The texts are read one after another, one a line, as in the official program: the end of a text, "by J. R.", may
    depend on the beginning of the next.
    """
    found: list[list[str]] = [[]]
    for match in SCANNER.finditer("\n".join(text.replace("\n", " ").replace("\r", " ") for text in texts)):
        if match.lastgroup == "line":
            found.append([])
        elif token := _written(match):
            found[-1].append(token)
    return found[: len(texts)]


def _written(match: re.Match[str]) -> str | None:
    kind, text = match.lastgroup, match[0].lower()
    if kind in DROPPED_KINDS or (kind == "sign" and ord(text[0]) > 0xFFFF):
        return None  # the Java program sees two invalid surrogates
    if kind == "smiley":
        text = text.replace("(", BRACKETS["("]).replace(")", BRACKETS[")"])
    elif kind == "mixed":
        text = text.replace(" ", "\u00a0")
    text = BRACKETS.get(text) or NORMAL.get(text, text.replace("\u2019", "'"))
    return text if text and text not in DROPPED else None
