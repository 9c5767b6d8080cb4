"""Out-of-memory errors: temporary, and less likely with less to do."""

from __future__ import annotations

import torch

from blip2.serve.errors import ApiError

WORDS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Texts of PyTorch's errors that have no class of their own."""


def shortage_error(error: BaseException) -> ApiError | None:
    """The error for waiting clients if the memory of any device ran out; else None.

    The original error should not be kept: its frames hold the memory.
    """
    is_one = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
    )
    if not is_one:
        return None
    message = "there is not enough memory for this at present; try again, with fewer beams or answers"
    return ApiError(503, "out_of_memory", message, headers={"Retry-After": "2"})
