"""What the names of the reference are tested with."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", params=["opt", "t5", "llama"])
def any_model(request, tmp_path_factory):
    """The folder of a tiny random model, of each family in turn that the names of the reference are for."""
    from tests import tiny

    return tiny.save_generative(request.param, tmp_path_factory.mktemp(request.param))
