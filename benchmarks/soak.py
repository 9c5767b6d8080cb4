"""A server for half an hour among attackers: are the others answered right, in time, and is nothing left?

Of the requests one in ten is an attack (`tests/serve/attacks.py`) and one in ten hangs up; each minute one of the
processes that read requests is killed, and with ``--replicas``, half way, one replica. Every other answer is compared
with Python's.

    python benchmarks/soak.py --minutes 30 --json docs/benchmarks/soak.json
    python benchmarks/soak.py --minutes 30 --replicas 2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import blip2  # noqa: E402
from blip2.serve.service import Models  # noqa: E402
from tests.serve import test_abuse as mixture  # noqa: E402
from tests.serve.attacks import ATTACKS, SLOW_HOST_PORT  # noqa: E402
from tests.serve.server_process import INNOCENT, Repeated, ServerProcess, kill  # noqa: E402

NUM_CLIENTS, NUM_ATTACKERS, NUM_ATTACKS = 8, 4, 24
SHARE = 0.1
"""Of attacks, and of hang-ups."""
NOT_IN_A_SOAK = ("large uploads that stop", "silent connections", "pipelined")
"""These are nothing when they come one at a time."""
AFTER_DEATH_S = 30.0
"""So long after a replica was killed its requests may be refused."""
KILL_S = 60.0


# ---- attackers, in a process of their own ----


def attack(port: int, seed: int) -> None:
    """Each line that comes in is an attack to be begun."""
    import threading

    from tests.serve.attacks import Target

    chance, target = random.Random(seed), Target(port)
    names = chance.sample([name for name in ATTACKS if name not in NOT_IN_A_SOAK], NUM_ATTACKS)
    sends = {name: ATTACKS[name].make() for name in names}
    print("begun", flush=True)
    lock, found, places = threading.Lock(), defaultdict(Counter), threading.Semaphore(64)

    def one(name: str) -> None:
        try:
            status = sends[name](target)
        except (OSError, ValueError):
            status = 0
        with lock:
            found[name][str(status)] += 1
        places.release()

    for _ in sys.stdin:
        if places.acquire(blocking=False):
            threading.Thread(target=one, args=(chance.choice(names),), daemon=True).start()
    time.sleep(1)
    with lock:
        print(json.dumps(found), flush=True)
    os._exit(0)


# ---- the others ----


class Soak:
    def __init__(self, server: ServerProcess, pool: list[Any], seconds: float, has_replicas: bool) -> None:
        self.server, self.pool, self.seconds, self.has_replicas = server, pool, seconds, has_replicas
        self.chance = random.Random(1)
        self.statuses: dict[str, Counter[str]] = defaultdict(Counter)
        self.times_s: list[float] = []
        self.wrong: list[str] = []
        self.num_attacks = 0
        self.deaths_s: list[float] = []
        self.began_s = time.monotonic()

    async def run(self, attackers: list[subprocess.Popen[str]]) -> None:
        transport = httpx.AsyncHTTPTransport(local_address=INNOCENT, limits=httpx.Limits(max_connections=64))
        url = f"http://127.0.0.1:{self.server.port}"
        async with httpx.AsyncClient(base_url=url, transport=transport, timeout=130) as http:
            await asyncio.gather(*(self._client(http, attackers) for _ in range(NUM_CLIENTS)))

    async def _client(self, http: httpx.AsyncClient, attackers: list[subprocess.Popen[str]]) -> None:
        client = mixture.Client(http, "127.0.0.1", self.server.port)
        while time.monotonic() < self.began_s + self.seconds:
            draw = self.chance.random()
            if draw < SHARE:
                attacker = self.chance.choice(attackers)
                assert attacker.stdin is not None
                attacker.stdin.write("\n")
                attacker.stdin.flush()
                self.num_attacks += 1
            elif draw < 2 * SHARE:
                kind = self.chance.choice(["half a body", "impatient"])
                await mixture.MALFORMED[kind](self.chance).__call__(client)
                self.statuses["hung up"][kind] += 1
            else:
                await self._innocent(client)

    async def _innocent(self, client: mixture.Client) -> None:
        case, began_s = mixture.good(self.chance, self.pool), time.monotonic()
        try:
            problem = await case.send(client)
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__} {error}"
        now_s = time.monotonic()
        if problem is None:
            self.statuses[case.kind]["right"] += 1
            self.times_s.append(now_s - began_s)
            return
        is_dead = any(0 <= now_s - death_s < AFTER_DEATH_S for death_s in self.deaths_s)
        is_refused = problem.startswith(("503 ", "429 "))
        name = "of the dead replica" if is_dead and is_refused else problem[:3] if is_refused else "wrong"
        self.statuses[case.kind][name] += 1
        if name != "of the dead replica":
            self.wrong.append(f"{now_s - self.began_s:.0f} s: {case.kind}: {problem[:300]}")


def replicas(server: ServerProcess) -> list[int]:
    """Ray names their processes."""
    found = []
    for process in server.processes():
        try:
            name = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::") and b"eplica" in name:
            found.append(process)
    return found


def quantiles(times_s: list[float]) -> dict[str, float]:
    ordered = sorted(times_s) or [0.0]
    return {name: round(ordered[int(share * (len(ordered) - 1))], 4)
            for name, share in (("p50_s", 0.5), ("p99_s", 0.99), ("max_s", 1.0))}  # fmt: skip


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "attack":
        attack(int(sys.argv[2]), int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--replicas", type=int, default=0, help="with Ray; 0: one server without it")
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    mixture.NUM_PICTURES = args.pictures
    pool = mixture.in_python(Models(blip2.load(), blip2.load("miniature-itm")), random.Random(2))
    arguments = ["--cache-entries", "32"]
    if args.replicas:
        arguments += ["--engine", "ray", "--replicas", str(args.replicas)]
    with ServerProcess(*arguments, fetches_from=None if args.replicas else SLOW_HOST_PORT, ready_s=240) as server:
        soak = Soak(server, pool, 30, False)
        asyncio.run(soak.run([subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)]))
        assert not soak.wrong, soak.wrong[:5]
        print(f"alone: {quantiles(soak.times_s)}, {len(soak.times_s)} requests in 30 s", flush=True)
        alone = quantiles(soak.times_s)
        soak.times_s.clear()
        time.sleep(4)
        rest = server.taken()
        commands = [[sys.executable, __file__, "attack", str(server.port), str(seed)] for seed in range(NUM_ATTACKERS)]
        attackers = [
            subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})
            for command in commands
        ]  # fmt: skip
        for attacker in attackers:
            assert attacker.stdout is not None
            assert (line := attacker.stdout.readline()) == "begun\n", (line, attacker.poll())

        def health() -> str | None:
            status, _ = server.ask("GET", "/health", timeout_s=30, address=INNOCENT)
            return None if status == 200 else f"/health says {status}"

        soak = Soak(server, pool, 60 * args.minutes, bool(args.replicas))
        curve: list[dict[str, Any]] = []
        killed: list[str] = []

        def watch() -> None:
            now_s = time.monotonic() - soak.began_s
            curve.append({"s": round(now_s), **{name: round(each, 1) for name, each in asdict(server.taken()).items()}})
            if now_s > KILL_S * (1 + killed.count("reader")) - KILL_S / 2 and (found := server.readers()):
                kill(random.choice(found))
                killed.append("reader")
            if args.replicas and "replica" not in killed and now_s > soak.seconds / 2 and (found := replicas(server)):
                soak.deaths_s.append(time.monotonic())
                kill(found[0])
                killed.append("replica")

        pings, watching = Repeated(health, 0.1), Repeated(watch, 5)
        asyncio.run(soak.run(attackers))
        pings.end()
        watching.end()
        attacks: dict[str, Counter[str]] = defaultdict(Counter)
        for attacker in attackers:
            assert attacker.stdin is not None and attacker.stdout is not None
            attacker.stdin.close()
            for name, counts in json.loads(attacker.stdout.readline()).items():
                attacks[name].update(counts)
            attacker.wait()
        after, back_s, left = server.at_rest(rest, 90)
        found = {
            "minutes": args.minutes, "replicas": args.replicas, "cores": os.cpu_count(),
            "requests": {kind: dict(counts) for kind, counts in sorted(soak.statuses.items())},
            "attacks": {name: dict(counts) for name, counts in sorted(attacks.items())},
            "num_attacks": soak.num_attacks, "killed": dict(Counter(killed)), "wrong": soak.wrong[:50],
            "innocent_alone": alone, "innocent": quantiles(soak.times_s), "health": quantiles(pings.times_s),
            "health_problems": pings.problems[:20], "rest": asdict(rest), "after": asdict(after),
            "after_s": round(back_s, 1), "left": left, "curve": curve,
        }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    for name, each in found.items():
        if name != "curve":
            print(f"{name}: {json.dumps(each, indent=1) if isinstance(each, dict) else each}")
    most = max(curve, key=lambda each: each["memory_mb"])
    print(f"most memory: {most}")
    sys.exit(bool(soak.wrong or pings.problems or left))


if __name__ == "__main__":
    main()
