"""Near duplicates: no pair above the threshold is missed, none below is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.index import duplicates
from blip2.index.duplicates import groups


def brute_force(vectors_NL: torch.Tensor, threshold: float) -> list[tuple[float, list[int]]]:
    unit_NL = F.normalize(vectors_NL.double(), dim=-1)
    cosine_NN = (unit_NL @ unit_NL.T).float().clamp(max=1)
    group = list(range(len(vectors_NL)))
    best = [-1.0] * len(vectors_NL)
    for first in range(len(vectors_NL)):
        for second in range(first + 1, len(vectors_NL)):
            if cosine_NN[first, second] >= threshold:
                joined = {group[first], group[second]}
                group = [min(joined) if each in joined else each for each in group]
                for row in (first, second):
                    best[row] = max(best[row], float(cosine_NN[first, second]))
    found = []
    for number in set(group):
        rows = [row for row, each in enumerate(group) if each == number]
        if len(rows) > 1:
            found.append((max(best[row] for row in rows), rows))
    return sorted(found, key=lambda each: (-each[0], each[1]))


def check(vectors_NL: torch.Tensor, threshold: float) -> None:
    expected, found = brute_force(vectors_NL, threshold), groups(vectors_NL, threshold)
    assert sorted(rows for _, rows in found) == sorted(rows for _, rows in expected)
    assert [best for best, _ in found] == pytest.approx([best for best, _ in expected], abs=1e-5)


def planted(seed: int, number: int, length: int, noise: float) -> torch.Tensor:
    """Some rows with others near them, half precision."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(number // 3, 1), length, generator=generator)
    chosen = centres[torch.randint(len(centres), (number,), generator=generator)]
    return F.normalize(chosen + noise * torch.randn(number, length, generator=generator), dim=-1).half()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    number=st.integers(1, 60),
    length=st.sampled_from([4, 64, 300]),
    noise=st.sampled_from([0.0, 0.01, 0.1, 0.3, 1.0]),
    threshold=st.sampled_from([0.3, 0.9, 0.95, 0.99, 1.0]),
)
def test_as_brute_force(seed, number, length, noise, threshold):
    check(planted(seed, number, length, noise), threshold)


@pytest.mark.parametrize("directions", [1, 8, 64])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_and_directions_change_nothing(monkeypatch, block, directions):
    monkeypatch.setattr(duplicates, "BLOCK", block)
    monkeypatch.setattr(duplicates, "SAMPLE", 16)
    monkeypatch.setattr(duplicates, "DIRECTIONS", directions)
    check(planted(3, 90, 64, 0.2), 0.95)


def test_the_same_picture_twice_is_wholly_similar():
    vectors_NL = planted(0, 30, 256, 1.0)
    vectors_NL[20] = vectors_NL[4]
    assert groups(vectors_NL, 1.0) == [(1.0, [4, 20])]


def test_a_chain_is_one_group():
    angles = torch.arange(40) * 0.1
    vectors_NL = torch.stack([angles.cos(), angles.sin()], dim=1).half()
    ((similarity, rows),) = groups(vectors_NL, 0.99)
    assert rows == list(range(40)) and similarity == pytest.approx(0.995, abs=1e-3)


def test_many_copies_are_one_group():
    vectors_NL = planted(0, 1, 64, 0).expand(3000, 64).contiguous()
    assert groups(vectors_NL, 0.95) == [(1.0, list(range(3000)))]


def test_in_the_index(index_of):
    vectors_NQD = torch.randn(50, 4, 16, generator=torch.Generator().manual_seed(0))
    vectors_NQD[10] = vectors_NQD[30] + 0.05 * vectors_NQD[1]
    ((similarity, paths),) = index_of(vectors_NQD).near_duplicates()
    assert paths == ["/p0010", "/p0030"] and 0.95 < similarity < 1
