"""Large JSON piece by piece says what the whole says, wherever the pieces end."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blip2 import plaintext
from blip2.data import stream
from blip2.data.stream import MEMBER, elements
from blip2.errors import RecipeError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    value=st.lists(VALUES) | st.dictionaries(st.text(), VALUES | st.lists(VALUES)),
    piece=st.integers(1, 40),
    indent=st.sampled_from([None, 2]),
    ascii=st.booleans(),
)
def test_pieces_of_any_length(tmp_path_factory, value, piece, indent, ascii):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=ascii), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plaintext, "PIECE_CHARS", piece)
        found = list(elements(path))
    if isinstance(value, list):
        assert [element.value for element in found] == value
        assert {element.section for element in found} <= {""}
        return
    again: dict = {key: [] for key, inner in value.items() if isinstance(inner, list)}
    for section, key, inner, place in found:
        if place.endswith("]") and isinstance(key, int):
            again[section].append(inner)
        else:
            assert section == MEMBER
            again[key] = inner
    assert again == value


def test_lines_are_elements_too(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1]}\n{"a": 2}\n\n{"a": 3}\n')
    assert [element.value for element in elements(path)] == [{"a": [1]}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("7", "neither an object nor an array"),
        ('{"a": [1, 2', "it ends too early"),
        ("[1, 2] 3", "there is more after its end"),
        ('{"a"\n:\n[1,\n{"b" 2}]}', ":4: is not JSON"),
        ('{"a": 1 "b": 2}', "'}' is missing"),
        ("{1: 2}", "a key has to be a text"),
        ("[" * 100_000, "too deep"),
        ('["' + "a" * 500 + '"]', "an element does not end"),
    ],
)
def test_what_is_no_json_is_named(tmp_path, monkeypatch, text, problem):
    monkeypatch.setattr(stream, "LARGEST_ELEMENT", 300)
    monkeypatch.setattr(plaintext, "PIECE_CHARS", 100 if "aaa" in text else 2**20)
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(RecipeError) as raised:
        list(elements(path))
    assert problem in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_no_text_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        list(elements(path))
    with pytest.raises(RecipeError, match="cannot be read"):
        list(elements(tmp_path / "b.json"))
