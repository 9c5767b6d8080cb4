"""From what a model says to the lines of outputs."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.collection.record import Record
from blip2.collection.run import Outcome
from blip2.collection.wording import Wording, shortened, without_repeats
from blip2.errors import OptionError

RECORD = Record("10_sks dog/a.b.jpg", None, "photos/10_sks dog/a.b.jpg", "", "old words")


@pytest.mark.parametrize(
    ("options", "captions", "lines"),
    [
        ({}, ["a dog"], ["a dog"]),
        ({"prefix": "sks dog, ", "suffix": "."}, ["a dog"], ["sks dog, a dog."]),
        ({"prefix": "x"}, ["a dog"], ["xa dog"]),  # no blank is added
        (
            {"template": "{concept}: {caption} ({name}, {folder}, {old}) {{}}"},
            ["a dog"],
            ["sks dog: a dog (a.b, 10_sks dog, old words) {}"],
        ),
        ({"template": "{caption}"}, ["{name} a dog"], ["{name} a dog"]),  # what the model says is no template
        ({"replace": [("dog", "sks dog"), ("a ", "")]}, ["a dog"], ["sks dog"]),
        ({"remove": [r"^there is ", r", with the words .*"]}, ["there is a dog, with the words x"], ["a dog"]),
        ({"remove": [" on a [a-z]+"]}, ["a dog on a mat, and a cat"], ["a dog, and a cat"]),
        ({"forbid_words": ["image"]}, ["an image of a dog", "a dog"], ["a dog", "an of a dog"]),
        ({"forbid_words": ["IMAGE OF", "image"]}, ["an image of imagery"], ["an imagery"]),
        ({"forbid_words": ["dog"]}, ["a dog, a cat"], ["a, a cat"]),
        ({"forbid_words": ["dog"], "prefix": "x "}, ["dog"], []),  # never a prefix alone
        ({"dedupe_words": True}, ["a dog a dog a dog"], ["a dog"]),
        ({"max_chars": 12}, ["a dog on the grass"], ["a dog on the"]),
        ({"max_chars": 12, "prefix": "sks, ", "suffix": "."}, ["a dog on"], ["sks, a dog."]),
        ({"max_chars": 6}, ["eine Donaudampfschiffahrt"], ["eine"]),
        ({"max_chars": 4}, ["Donaudampfschiffahrt"], ["Dona"]),
        ({"if_exists": "append"}, ["a dog"], ["old words, a dog"]),
        ({"if_exists": "prepend", "separator": " | "}, ["a dog"], ["a dog | old words"]),
        ({"if_exists": "append", "separator": "\n"}, ["a dog", "a cat"], ["old words", "a dog", "a cat"]),
        ({"if_exists": "append"}, ["words"], ["old words, words"]),
        ({"if_exists": "overwrite"}, ["a dog"], ["a dog"]),
        ({}, ["a dog", "a cat", "a dog"], ["a dog", "a cat"]),
        ({}, ["a\ndog\u2028 with\x07 \x00bells\ufeff"], ["a dog with bells"]),
        ({}, ["cafe\u0301"], ["caf\xe9"]),
        ({}, ["half \ud83d"], ["half \ufffd"]),
        ({}, ["  "], []),
        ({}, [", ."], []),
    ],
)
def test_line(options, captions, lines):
    wording = Wording(**options)
    assert wording.lines(RECORD, captions) == lines
    assert wording(RECORD, Outcome(captions, [0.0], [1])) == "\n".join(lines)


def test_what_was_appended_is_not_appended_again():
    wording = Wording(if_exists="append")
    (line,) = wording.lines(RECORD, ["a dog"])
    again = Record(RECORD.key, None, RECORD.name, "", line)
    assert wording.lines(again, ["a dog"]) == [line]
    assert Wording(if_exists="append").lines(Record("a", None, "a", "", "one\ntwo"), ["x"]) == ["one, x", "two, x"]


@pytest.mark.parametrize(
    ("key", "name", "said"),
    [
        ("a.jpg", "10_sks dog/a.jpg", "a|10_sks dog|sks dog"),  # right in the root of the source
        ("sub/20_x/IMG.1.jpg", "root/sub/20_x/IMG.1.jpg", "IMG.1|20_x|x"),
        ("000010005", "00001.tar: 000010005", "000010005||"),
        ("10_/a.jpg", "x/10_/a.jpg", "a|10_|10_"),
        ("\udcff/\udcfe.jpg", "\udcff/\udcfe.jpg", "\ufffd|\ufffd|\ufffd"),
    ],
)
def test_places(key, name, said):
    record = Record(key, None, name, "")
    assert Wording(template="{name}|{folder}|{concept}{caption}").lines(record, ["!"]) == [said + "!"]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("a dog a dog a dog", "a dog"),
        ("a dog, a dog, a dog, a", "a dog"),
        ("a man and a man and a man", "a man"),
        ("two dogs dogs dogs dogs", "two dogs"),
        ("a cat with a cat with a cat with a", "a cat with"),
        ("A dog a Dog", "A dog"),
        ("a red red car", "a red red car"),
        ("sunset in Bora Bora", "sunset in Bora Bora"),
        ("a dog and a dog", "a dog and a dog"),
        ("no no no no yes yes yes yes", "no no no no yes"),
        ("", ""),
    ],
)
def test_repeats(text, cut):
    assert without_repeats(text) == cut
    assert without_repeats(cut) == cut


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"template": "{caption} {title}"}, "{title}"),
        ({"template": "{caption!r}"}, "{caption!r}"),
        ({"template": "{caption:>9}"}, "{caption:>9}"),
        ({"template": "{caption.x}"}, "{caption.x}"),
        ({"template": "{} {caption}"}, "{}"),
        ({"template": "{caption"}, "'{caption'"),
        ({"template": "{concept}"}, "{caption}"),
        ({"remove": ["(a"]}, "'(a'"),
        ({"remove": [""]}, "empty"),
        ({"replace": [("", "x")]}, "OLD=NEW"),
        ({"forbid_words": [" "]}, "forbid_words"),
        ({"max_chars": 3, "prefix": "sks"}, "max_chars"),
        ({"max_chars": 0}, "max_chars"),
        ({"if_exists": "add"}, "append"),
    ],
)
def test_refused(options, told):
    with pytest.raises(OptionError) as caught:
        Wording(**options)
    assert told in str(caught.value)


def test_a_pattern_that_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr("blip2.collection.patterns.MAX_S", 1.0)
    with pytest.raises(OptionError, match="too long"):
        Wording(remove=["^a", r"(\w+\s?)+!"])
    Wording(remove=[r"( \w+)+$", r", with the (words|letters) .*"])


TEXTS = st.text(st.characters(), max_size=40)


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.integers(12, 60), st.booleans())
def test_any_text_is_a_line(caption, prefix, old, max_chars, dedupe):
    wording = Wording(prefix=prefix[:10], max_chars=max_chars, dedupe_words=dedupe)
    for line in wording.lines(Record("a", None, "a", "", old), [caption]):
        assert line.strip() and len(line) <= max_chars
        assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in line)
        assert unicodedata.is_normalized("NFC", line)
        assert line.splitlines() == [line]


@given(TEXTS, st.integers(0, 30))
def test_shortened(text, max_chars):
    cut = shortened(text, max_chars)
    assert len(cut) <= max_chars and text.startswith(cut)
