"""When memory is lacking: a fault of the moment, which with less to do may not come again."""

from __future__ import annotations

import torch

from blip2.serve.errors import ApiError

WORDS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In the errors of PyTorch's that have no class of their own."""


def told_shortage(error: BaseException) -> ApiError | None:
    """What those who waited are told, if an error means that memory was lacking, on whatever device; else None.

    The error itself is better not kept: its frames hold what took the memory.
    """
    is_one = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
    )
    if not is_one:
        return None
    message = "there is not enough memory for this at present; try again, with fewer beams or answers"
    return ApiError(503, "out_of_memory", message, headers={"Retry-After": "2"})
