"""While the model is loading: for how long, how much of it is there, and the answer to requests."""

from __future__ import annotations

import time

from blip2.serve.errors import ApiError


class Loading:
    """Starts the clock. `note` may be called in any thread."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._percent: int | None = None

    def note(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes are read: the ``progress`` of `blip2.load`."""
        self._percent = 100 * done // total if total else None

    def refusal(self) -> ApiError:
        """The answer to requests until the model is there."""
        seconds = f"{time.monotonic() - self._start_s:.0f}"
        headers, so_far = {"Retry-After": "2", "X-Blip2-Loading-Seconds": seconds}, f"{seconds} s so far"
        if self._percent is not None:
            headers["X-Blip2-Loading-Percent"] = str(self._percent)
            so_far += f", {self._percent} %"
        return ApiError(503, "loading", f"the model is loading ({so_far}); try again", headers=headers)
