"""What holds for every test: no network, and so no accidental download of a checkpoint. Tiny models to share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# A shell ignores SIGINT in what it starts in the background, and so would programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", params=["opt", "t5", "llama", "t5, instructed", "llama, instructed"])
def any_model(request, tmp_path_factory) -> Path:
    """The folder of a tiny random model that writes, of each kind in turn."""
    from tests import tiny

    family, _, is_instructed = request.param.partition(", ")
    save = tiny.save_instructed if is_instructed else tiny.save_generative
    return save(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="session")
def opt_model(tmp_path_factory) -> Path:
    """The folder of a tiny random model of the OPT family."""
    from tests import tiny

    return tiny.save_generative("opt", tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="session")
def matching_model(tmp_path_factory) -> Path:
    """The folder of a tiny random matching model."""
    from tests import tiny

    return tiny.save_matching(tmp_path_factory.mktemp("matching"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[str]:
    """Eight image files."""
    from tests import tiny

    return tiny.save_pictures(tmp_path_factory.mktemp("pictures"), 8)
