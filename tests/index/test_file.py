"""The file is plain safetensors; whatever happens to it, one clear error or what was written."""

from __future__ import annotations

import json
import os
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import save_file

from blip2.errors import Blip2Error, IndexFileError
from blip2.index import Index, is_index
from blip2.index.file import IndexedImage, Origin, crc32_of, read, write
from blip2.index.folders import Stamp
from blip2.index.search import nearest

ORIGIN = Origin("ask", "some/model", "0123456789abcdef")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small index, and its bytes."""
    path = tmp_path_factory.mktemp("made") / "photos.index"
    vectors_NQD = torch.arange(3 * 2 * 4, dtype=torch.float16).view(3, 2, 4) / 7
    write(path, ORIGIN, pictures(vectors_NQD), (2, 4), vectors_NQD)
    return path, path.read_bytes(), vectors_NQD


def pictures(vectors_NQD) -> list[IndexedImage]:
    return [
        IndexedImage(f"/päth/{row}.png", Stamp(row, 10**18 + row), crc32_of(each))
        for row, each in enumerate(vectors_NQD)
    ]


def contents(path) -> tuple:
    """All that a reader gets from it."""
    index = Index.open(path)
    return index.kind, index.model_name, index.paths, [seen.queries_QD.tolist() for seen in index]


def test_anyone_can_open_it(made):
    path, _, vectors_NQD = made
    tensors = load_file(path)
    assert (tensors["vectors"] == vectors_NQD.numpy()).all()
    rows = [json.loads(line) for line in tensors["pictures"].tobytes().splitlines()]
    assert rows[2] == {"path": "/päth/2.png", "size": 2, "mtime_ns": 10**18 + 2, "crc32": crc32_of(vectors_NQD[2])}


def test_it_is_read_as_it_was_written(made):
    path, _, vectors_NQD = made
    stored = read(path)
    assert stored.origin == ORIGIN
    assert stored.images() == pictures(vectors_NQD)
    assert torch.equal(stored.vectors_NQD, vectors_NQD)
    assert [seen.model for seen in Index.open(path)] == [ORIGIN.identity] * 3
    assert torch.equal(Index.open(path)[-1].queries_QD, vectors_NQD[2])


def test_opening_does_not_read_the_vectors(tmp_path):
    """They are mapped: a copy would be fresh memory of the process."""
    path = tmp_path / "large.index"
    one_QD = torch.zeros(32, 1024, dtype=torch.float16)
    images = [IndexedImage(f"/{row:04}", Stamp(1, 1), 0) for row in range(2000)]
    write(path, ORIGIN, images, (32, 1024), [one_QD] * 2000)
    before = resident_bytes()
    index = Index.open(path)
    assert index.vectors[1000, 3, 5] == 0
    assert resident_bytes() - before < 30e6 < index.vectors.nbytes


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_it_is_known_by_its_beginning(made, tmp_path):
    path, content, _ = made
    renamed = tmp_path / "photos.safetensors"
    renamed.write_bytes(content)
    assert is_index(path) and is_index(renamed)
    assert not is_index(tmp_path) and not is_index(tmp_path / "missing.index")
    save_file({"vectors": torch.zeros(3)}, renamed)
    assert not is_index(renamed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path, content: path.write_bytes(content[:-1]), "truncated"),
        (lambda path, content: path.write_bytes(content[:30]), "truncated"),
        (lambda path, content: path.write_bytes(b""), "not an index of images"),
        (lambda path, content: path.write_bytes(b"\xff" * 1000), "not an index of images"),
        (lambda path, content: save_file({"vectors": torch.zeros(3)}, path), "a safetensors file, but not"),
        (lambda path, content: path.write_bytes(content.replace(b'"version": "1"', b'"version": "2"')), "format 2"),
        (lambda path, content: path.write_bytes(content.replace(b"1.png", b"8.png")), "is damaged"),
        (lambda path, content: path.write_bytes(content.replace(b"some/model", b"same/model")), "is damaged"),
        (lambda path, content: path.write_bytes(content.replace(b"[3, 2, 4]", b"[3, 4, 2]")), "is damaged"),
        (lambda path, content: path.unlink(), "no such index"),
        (lambda path, content: (path.unlink(), path.mkdir()), "is a folder"),
    ],
)
def test_what_is_no_index(made, tmp_path, change, message):
    path = tmp_path / "photos.index"
    path.write_bytes(made[1])
    change(path, made[1])
    with pytest.raises(IndexFileError, match=message) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def made_to_search(path, seed=0) -> Index:
    vectors_NQD = F.normalize(torch.randn(300, 2, 8, generator=torch.Generator().manual_seed(seed)), dim=-1).half()
    write(path, Origin("search", "none", "none"), pictures(vectors_NQD), (2, 8), vectors_NQD)
    return Index.open(path)


def found_in(path) -> tuple:
    """All that is found: of a text, of an image, near duplicates."""
    index, query_L = Index.open(path), F.normalize(torch.arange(8.0), dim=0)
    near = nearest(index._stored.rows, query_L, 3)
    like = nearest(index._stored.rows.viewed(1, 16), query_L.repeat(2), 3, length=2**0.5)
    return index.paths, near, like, index.near_duplicates(0.8)


def test_a_flipped_bit_is_never_another_answer(tmp_path):
    """Also where it is in a row that would have been found, and is not any more."""
    path = tmp_path / "photos.index"
    made_to_search(path)
    wanted, content = found_in(path), path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), 60):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert found_in(path) == wanted
        except IndexFileError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("ask", [
    lambda index: nearest(index._stored.rows, torch.ones(8), 3),
    lambda index: index.near_duplicates(0.8),
    lambda index: index._stored.vectors(299),
    lambda index: index.vectors,
])  # fmt: skip
def test_one_that_is_cut_while_it_is_open(tmp_path, ask):
    """A map of it would end the process at the first of these."""
    index = made_to_search(path := tmp_path / "photos.index")
    ask(index)
    os.truncate(path, 4000)
    with pytest.raises(IndexFileError, match=r"photos\.index"):
        ask(index)


def test_one_that_is_overwritten_while_it_is_open(tmp_path):
    """In place, as cp and rsync do: what was checked before is checked again."""
    path, other = tmp_path / "photos.index", tmp_path / "other.index"
    index = made_to_search(path)
    nearest(index._stored.rows, torch.ones(8), 3)
    made_to_search(other, seed=1)
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(1, 1))  # the system's clock may not have ticked
    with pytest.raises(IndexFileError, match="is damaged"):
        nearest(index._stored.rows, torch.ones(8), 3)


def test_one_that_is_replaced_while_it_is_open_stays(tmp_path):
    index = made_to_search(tmp_path / "photos.index")
    wanted = index.vectors.clone()
    made_to_search(tmp_path / "other.index", seed=1)
    os.replace(tmp_path / "other.index", tmp_path / "photos.index")
    assert torch.equal(index._stored.rows[torch.arange(300)], wanted) and torch.equal(index.vectors, wanted)
    assert not torch.equal(pickle.loads(pickle.dumps(index)).vectors, wanted)  # opened anew


def check_corrupted(path, content, expected):
    path.write_bytes(content)
    try:
        assert contents(path) == expected
    except Blip2Error as error:
        assert str(path) in str(error) and "\n" not in str(error)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_an_error_or_change_nothing(made, data, tmp_path_factory):
    _, content, _ = made
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    check_corrupted(tmp_path_factory.getbasetemp() / "damaged.index", bytes(damaged), contents(made[0]))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_cut_or_stretched_it_is_an_error(made, data, tmp_path_factory):
    _, content, _ = made
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    filling = data.draw(st.binary(max_size=40))
    check_corrupted(
        tmp_path_factory.getbasetemp() / "cut.index", content[:start] + filling + content[end:], contents(made[0])
    )


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300))
def test_garbage_is_an_error(made, content, tmp_path_factory):
    check_corrupted(tmp_path_factory.getbasetemp() / "garbage.index", content, None)
