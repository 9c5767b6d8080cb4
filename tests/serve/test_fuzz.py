"""Ten thousand requests of which hardly any is right. ``BLIP2_FUZZ_REQUESTS``: how many; ``BLIP2_FUZZ_SEED``: which."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from tests.serve.server_process import INNOCENT, ROOT, Repeated, ServerProcess

NUM_REQUESTS = int(os.environ.get("BLIP2_FUZZ_REQUESTS", "10000"))
SEED = int(os.environ.get("BLIP2_FUZZ_SEED", "1"))
SECONDS = 1800
"""At most, whatever they are."""


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 200)
def test_ten_thousand_odd_requests() -> None:
    """Each has an answer that tells what was wrong with it, and nothing is left of them."""
    with ServerProcess("--cache-entries", "16", "--deadline", "100") as server:

        def health() -> str | None:
            status, _ = server.ask("GET", "/health", timeout_s=20, address=INNOCENT)
            return None if status == 200 else f"/health says {status}"

        def fuzzed(first: int, last: int) -> tuple[Counter[str], list[str]]:
            done = subprocess.run(
                [sys.executable, "-m", "tests.serve.fuzz", *map(str, (server.port, SEED, first, last))],
                cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=SECONDS,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            found = json.loads(done.stdout)
            return Counter(found["statuses"]), found["problems"]

        _, problems = fuzzed(NUM_REQUESTS, NUM_REQUESTS + 200)  # what is loaded once, is
        time.sleep(3)
        rest, began_s = server.taken(), time.monotonic()
        pings = Repeated(health, 0.1)
        statuses, more = fuzzed(0, NUM_REQUESTS)
        pings.end()
        took_s = time.monotonic() - began_s
        problems += more
        _, back_s, left = server.at_rest(rest)
        print(f"\n{statuses} in {took_s:.0f} s, /health at worst {max(pings.times_s):.2f} s, back after {back_s:.0f} s")
        assert not problems, (len(problems), problems[:10], server.said()[-3000:])
        assert not pings.problems and max(pings.times_s) <= 0.5
        assert sum(statuses.values()) == NUM_REQUESTS
        assert not left
        assert server.process.poll() is None
