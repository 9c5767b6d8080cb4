"""The search is exact: what brute force in double precision finds, in its order."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import blip2
from blip2 import native
from blip2.errors import ImageError, IndexFileError, OptionError
from blip2.index import search as search_module
from blip2.index.search import nearest


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def brute_force(vectors_NRL: torch.Tensor, query_L: torch.Tensor, number: int) -> tuple[list[float], list[int]]:
    scores_N = F.cosine_similarity(vectors_NRL.double(), query_L.double(), dim=-1).amax(dim=1).float()
    rows = sorted(range(len(vectors_NRL)), key=lambda row: (-float(scores_N[row]), row))[:number]
    return [float(scores_N[row]) for row in rows], rows


@pytest.fixture(autouse=True, params=["kernel", "torch"])
def way(request, monkeypatch):
    """By the C kernel and by torch."""
    if request.param == "torch":
        monkeypatch.setattr(native, "greatest", lambda vectors_NRL, query_L: None)
    elif native.greatest(torch.zeros(1, 1, 1, dtype=torch.float16), torch.zeros(1)) is None:
        pytest.skip("the C kernel is not compiled here, or the processor is without half precision")


@pytest.mark.parametrize("number", [1, 10, 2999, 3000, 5000])
def test_random_vectors(number):
    vectors_NRL, query_L = unit(3000, 8, 64).half(), unit(64, seed=1)
    assert nearest(vectors_NRL, query_L, number) == brute_force(vectors_NRL, query_L, number)


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 10**9])
def test_the_size_of_the_portions_changes_nothing(monkeypatch, chunk_bytes):
    monkeypatch.setattr(search_module, "CHUNK_BYTES", chunk_bytes)
    vectors_NRL, query_L = unit(300, 4, 32).half(), unit(32, seed=1)
    assert nearest(vectors_NRL, query_L, 7) == brute_force(vectors_NRL, query_L, 7)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), length=st.sampled_from([8, 256, 1024]), number=st.integers(1, 40))
@example(seed=447, length=1024, number=1)
def test_near_ties_are_put_in_order(seed, length, number):
    """All images within what half precision can tell: rows that differ in the last bits of a few numbers."""
    query_L = unit(length, seed=seed)
    vectors_NRL = query_L.half().expand(200, 2, length).clone()
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-1, 2, vectors_NRL.shape, generator=generator, dtype=torch.int16)
    bits[vectors_NRL.abs() < 1e-4] = 0  # below nought in its bits is not a number
    vectors_NRL = (vectors_NRL.view(torch.int16) + bits * (torch.rand(bits.shape, generator=generator) < 0.1)).view(
        torch.float16
    )
    assert nearest(vectors_NRL, query_L, number) == brute_force(vectors_NRL, query_L, number)
    # It would not do to believe the products in half precision.
    assert len(set(torch.mv(vectors_NRL[:, 0], query_L.half()).tolist())) < 5


def test_the_error_is_bounded():
    """The rough scores are never off by more than they claim, and the claim is no more than some units of rounding."""
    for seed, length in ((0, 16), (1, 256), (2, 1024)):
        vectors_NRL, query_L = unit(2000, 4, length, seed=seed).half(), unit(length, seed=seed + 10)
        roughly_N, error = search_module.roughly(vectors_NRL, query_L.double(), 1.0)
        off = abs(roughly_N - search_module.exactly(vectors_NRL, query_L.double())).max()
        assert off <= error < 3e-3


def test_equals_come_in_the_order_of_their_rows():
    vectors_NRL = unit(1, 3, 16).half().expand(500, 3, 16).contiguous()
    assert nearest(vectors_NRL, unit(16, seed=1), 20)[1] == list(range(20))


def test_whole_pictures_are_compared_by_their_cosine():
    vectors_NQD, query_QD = unit(500, 8, 32).half(), unit(8, 32, seed=1)
    whole_NRL = vectors_NQD.view(500, 1, -1)
    assert nearest(whole_NRL, query_QD.flatten(), 9, length=8**0.5) == brute_force(whole_NRL, query_QD.flatten(), 9)


def test_all_scores_negative():
    query_L = unit(16, seed=1)
    vectors_NRL = F.normalize(-query_L + 0.1 * unit(50, 1, 16), dim=-1).half()
    assert nearest(vectors_NRL, query_L, 5) == brute_force(vectors_NRL, query_L, 5)


# ---- with a model ----


@pytest.fixture(scope="module")
def index(matcher, pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "photos.index"
    blip2.Index.update(path, pictures, matcher)
    return blip2.Index.open(path)


def test_a_text(index, matcher):
    hits = index.search(matcher, "two dogs", 3)
    cosine_N = matcher.match(index.paths, ["two dogs"]).itc_cosine[:, 0]
    assert [hit.path for hit in hits] == [index.paths[row] for row in cosine_N.argsort(descending=True)[:3]]
    assert [hit.score for hit in hits] == pytest.approx(cosine_N.sort(descending=True).values[:3].tolist(), abs=1e-3)
    assert len(index.search(matcher, "two dogs", 100)) == 8


def test_a_picture_finds_itself(index, matcher, pictures):
    for picture in pictures[:3]:
        first, second, *_ = index.search_picture(matcher, picture)
        assert first.path == picture and first.score == pytest.approx(1, abs=1e-3) and second.score < first.score


def test_the_similarity_of_pictures_is_the_mean_over_the_queries(index, matcher, pictures):
    vectors_NQE = matcher.embed_images(pictures)
    expected_N = torch.einsum("nqe,qe->nq", vectors_NQE, vectors_NQE[2]).mean(dim=1)
    for hit in index.search_picture(matcher, pictures[2], 8):
        assert hit.score == pytest.approx(float(expected_N[hit.row]), abs=1e-3)


def test_reranking(index, matcher):
    hits = index.search(matcher, "two dogs", 8, rerank=5, batch_size=2)
    nearest_five = {hit.path for hit in index.search(matcher, "two dogs", 5)}
    assert {hit.path for hit in hits[:5]} == nearest_five
    assert [hit.is_reranked for hit in hits] == [True] * 5 + [False] * 3
    expected = matcher.match([hit.path for hit in hits[:5]], ["two dogs"]).score[:, 0].tolist()
    assert [hit.score for hit in hits[:5]] == pytest.approx(expected, abs=1e-5)
    assert expected == sorted(expected, reverse=True)
    assert [hit.path for hit in index.search(matcher, "two dogs", 2, rerank=5)] == [hit.path for hit in hits[:2]]


def test_what_is_gone_comes_after_what_was_reranked(matcher, photos, tmp_path):
    path = tmp_path / "photos.index"
    blip2.Index.update(path, photos, matcher)
    index = blip2.Index.open(path)
    gone = index.search(matcher, "two dogs", 1)[0]
    shutil.move(gone.path, photos / "elsewhere.png")
    problems = []
    hits = index.search(matcher, "two dogs", 4, rerank=4, on_problem=problems.append)
    assert hits[-1] == gone
    assert len(problems) == 1 and gone.path in problems[0]


def test_requests_that_make_no_sense(index, matcher, other_matcher, pictures):
    for request, message in (
        (lambda: index.search(matcher, "two dogs", 0), "k is 0"),
        (lambda: index.search(matcher, "two dogs", -1), "k is -1"),
        (lambda: index.search_picture(matcher, pictures[0], 0), "k is 0"),
        (lambda: index.search(matcher, "two dogs", rerank=-1), "rerank is -1"),
        (lambda: index.search(matcher, "  "), "text is empty"),
        (lambda: index.search(matcher, "two dogs " * 300), "tokens"),
        (lambda: index.near_duplicates(0), "threshold is 0"),
        (lambda: index.near_duplicates(1.5), "threshold is 1.5"),
    ):
        with pytest.raises(OptionError, match=message):
            request()
    with pytest.raises(ImageError):
        index.search_picture(matcher, "missing.png")
    with pytest.raises(IndexFileError, match="cannot read its vectors"):
        index.search(other_matcher, "two dogs")
    with pytest.raises(IndexFileError, match="not to ask"):
        index[0]


def test_damage_is_told_and_not_shown(matcher, photos, tmp_path):
    path = tmp_path / "photos.index"
    blip2.Index.update(path, photos, matcher)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start] + b"\xff" * 64 + content[start + 64 :])  # not numbers
    with pytest.raises(IndexFileError, match="is damaged"):
        blip2.Index.open(path).search(matcher, "two dogs", 1)
