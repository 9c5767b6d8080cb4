"""Image encoders of other families: the reference's features, from the files that the reference writes."""

from __future__ import annotations

import pytest

from tests.parity import encoders

TOLERANCE = 1e-4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_features(family: str, seed: int, tmp_path) -> None:
    worst, told = encoders.difference(family, seed, tmp_path)
    assert worst < TOLERANCE, told


@pytest.mark.slow
@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_features_of_many(family: str, tmp_path) -> None:
    found = [encoders.difference(family, seed, tmp_path / str(seed)) for seed in range(100, 180)]
    worst, told = max(found)
    print(f"{family}: {len(found)} configurations, at most {worst:.1e}")
    assert worst < TOLERANCE, told
