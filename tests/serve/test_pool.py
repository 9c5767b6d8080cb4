"""Requests are read by processes that can be ended at any moment, and that others do not wait for."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from PIL import Image

from blip2.serve import pool as pools
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.pool import Pool
from blip2.serve.turns import FairPool, Turns
from tests.serve.conftest import PICTURES, eventually, serving

PNG = PICTURES[0].read_bytes()
READ = {"do": "read", "route": "/caption", "type": "application/json"}


def body(picture: bytes = PNG) -> bytes:
    return b'{"image": "' + base64.b64encode(picture) + b'"}'


def slow_jpeg() -> bytes:
    """A flat image of 25 million pixels, of which each of the last scans goes over all of them again."""
    Image.new("L", (5000, 5000), 99).save(content := io.BytesIO(), "JPEG", progressive=True)
    scans = content.getvalue().removesuffix(b"\xff\xd9")
    return scans + scans[scans.rindex(b"\xff\xda") :] * 88 + b"\xff\xd9"


SLOW = slow_jpeg()


def pixels(**changed: object) -> dict:
    look = {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    asked = {"do": "pixels", "picture": 0, "look": look, "shown_px": 0}
    return {**asked, "max_pixels": 30_000_000, "is_last_word": True, **changed}


def pooled(use: Callable[[Pool], Awaitable[None]], **limits: int) -> None:
    async def run() -> None:
        pool = Pool(Limits(**limits))
        pool.start()
        try:
            async with asyncio.timeout(60):
                await use(pool)
        finally:
            pool.close()
        assert pool.parent.wait(10) is not None

    asyncio.run(run())


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.01)


def test_a_reader_reads_requests_and_pictures() -> None:
    async def use(pool: Pool) -> None:
        async with pool.reader("me", 0) as reader:
            told, _ = await reader.ask(READ, body())
            assert told["fields"]["prompt"] == "" and "image" not in told["fields"]
            told, content = await reader.ask(pixels(shown_px=8))
            assert len(content) == 3 * 32 * 32 * 4 + 3 * told["shown"][0] * told["shown"][1]
            with pytest.raises(ApiError, match="not valid base64"):
                await reader.ask(READ, b'{"image": "!"}')
            process = reader.process
        async with pool.reader("me", 0) as reader, pool.reader("you", 0) as other:
            assert process in (reader.process, other.process)  # it serves whoever is next

    pooled(use)


def test_who_goes_takes_the_reader_along() -> None:
    async def use(pool: Pool) -> None:
        processes = []

        async def read() -> None:
            async with pool.reader("me", 0) as reader:
                processes.append(reader.process)
                await reader.ask(READ, body(SLOW))
                await reader.ask(pixels())

        task = asyncio.create_task(read())
        await until(lambda: bool(processes))
        await asyncio.sleep(0.1)
        task.cancel()
        await until(lambda: not is_running(processes[0]))
        async with pool.reader("me", 0) as reader, pool.reader("me", 0) as other:  # and is replaced
            assert processes[0] not in (reader.process, other.process)

    pooled(use)


def test_slow_pictures_do_not_hold_up_others(monkeypatch) -> None:
    monkeypatch.setattr(pools, "MAX_SLOW", 2)

    async def use(pool: Pool) -> None:
        async def read(picture: bytes) -> str:
            try:
                async with pool.reader("me", len(picture)) as reader:
                    await reader.ask(READ, body(picture))
                    await reader.ask(pixels())
            except ApiError as error:
                return error.code
            return "read"

        slow = [asyncio.create_task(read(SLOW)) for _ in range(pools.MAX_SLOW + 2)]
        await until(lambda: sum(task.done() for task in slow) == 2)  # those beyond the slow lane's places
        began_s = time.monotonic()
        assert await read(PNG) == "read"
        assert time.monotonic() - began_s < 10
        assert not all(task.done() for task in slow)
        assert {*await asyncio.gather(*slow)} == {"busy", "read"}
        assert len(pool.processes) == pools.NUM_FAST

    pooled(use)


def test_a_picture_of_34_bytes_takes_no_memory_before_its_size_is_known() -> None:
    flat = b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0/\x9d[\xe7\x16\x07\x10\x11\x11\x88\x88\xfe\x07\0"  # 7070 x 7070

    async def use(pool: Pool) -> None:
        async with pool.reader("me", 0) as reader:
            await reader.ask(READ, body(flat))
            told, _ = await reader.ask(pixels(max_pixels=4_000_000, is_last_word=False))
            assert told == {"is_large": True}
            with pytest.raises(ApiError, match="7070x7070 is more than"):
                await reader.ask(pixels(max_pixels=49_000_000))

    pooled(use)


def test_processor_time_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(
        pools, "PARENT", "from blip2.serve import reader; reader.CPU_S = 0; reader.CPU_S_PER_PIXEL = 0; reader.main()"
    )

    async def use(pool: Pool) -> None:
        with pytest.raises(ApiError, match="too much processor time"):
            async with pool.reader("me", 0) as reader:
                await reader.ask(READ, body(SLOW))
                await reader.ask(pixels())
        async with pool.reader("me", 0) as reader:
            await reader.ask(READ, body())

    pooled(use)


def test_memory_is_bounded() -> None:
    async def use(pool: Pool) -> None:
        async with pool.reader("me", 0) as reader:
            Image.new("1", (20_000, 20_000)).save(content := io.BytesIO(), "PNG")
            await reader.ask(READ, body(content.getvalue()))
            told, _ = await reader.ask(pixels(is_last_word=False))
            assert told == {"is_large": True}
            with pytest.raises(ApiError) as found:
                await reader.ask(pixels(max_pixels=400_000_000 // 10))
            assert found.value.status == 413
            _, content_ = await reader.ask(READ, body())  # the same reader goes on
            assert content_ == b""

    pooled(use)


def test_a_decoder_that_breaks_down_costs_its_request_alone() -> None:
    async def use(pool: Pool) -> None:
        with pytest.raises(ApiError, match="crashed"):
            async with pool.reader("me", 0) as reader:
                await reader.ask(READ, body())
                os.kill(reader.process, signal.SIGSEGV)
                await reader.ask(pixels())
        async with pool.reader("me", 0) as reader:
            await reader.ask(READ, body())

    pooled(use)


def test_a_parent_that_dies_is_replaced() -> None:
    async def use(pool: Pool) -> None:
        async with pool.reader("me", 0):
            pass
        former = pool.parent
        orphans = pool.processes
        async with pool.reader("me", 0) as reader:
            former.kill()
            former.wait()
            reader.is_grown = True
        await until(lambda: pool.parent is not former and not any(map(is_running, orphans)))
        for _ in range(4):
            async with pool.reader("me", 0) as reader:
                reader.is_grown = True
                await reader.ask(READ, body())

    pooled(use)


def test_a_reader_that_is_killed_while_it_has_nothing_to_do_is_passed_over() -> None:
    async def use(pool: Pool) -> None:
        await until(lambda: len(pool.processes) == pools.NUM_FAST)
        killed = pool.processes
        for process in killed:
            os.kill(process, signal.SIGKILL)
        await until(lambda: not any(map(is_running, killed)))
        async with pool.reader("me", 0) as reader:
            await reader.ask(READ, body())
            assert reader.process not in killed

    pooled(use)


def test_a_reader_that_holds_much_memory_is_replaced() -> None:
    async def use(pool: Pool) -> None:
        used = []
        await until(lambda: len(pool.processes) == pools.NUM_FAST)
        for size in (1000, 10_000_000, 1000):
            async with pool.reader("me", size) as reader:
                with suppress(ApiError):
                    await reader.ask(READ, body(bytes(size)))
                used.append(reader)
        assert used[0] is used[1] is not used[2]
        assert used[1].process not in pool.processes

    pooled(use)


def test_who_hangs_up_while_the_parent_is_asked_leaves_it_in_order() -> None:
    """Else its answer is taken for that to the next command, and a number for a process."""

    async def use(pool: Pool) -> None:
        async def read() -> None:
            async with pool.reader("me", 0) as reader:
                os.kill(reader.process, signal.SIGSEGV)
                await reader.ask(READ, body())

        await until(lambda: len(pool.processes) == pools.NUM_FAST)
        os.kill(pool.parent.pid, signal.SIGSTOP)
        task = asyncio.create_task(read())
        await until(lambda: len(pool.processes) < pools.NUM_FAST)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        os.kill(pool.parent.pid, signal.SIGCONT)
        async with pool.reader("me", 0) as one, pool.reader("me", 0) as other:
            for reader in (one, other):
                await reader.ask(READ, body())
                assert is_running(reader.process)

    pooled(use)


def test_a_fork_that_fails_is_tried_again(monkeypatch) -> None:
    """There may be too many processes for a moment; those that are there go on."""
    failing = (
        "import os; fork, times = os.fork, iter([0, 1])\n"
        "def failing():\n"
        "    if next(times, None) is None: return fork()\n"
        "    raise BlockingIOError(11, 'too many processes')\n"
        "os.fork = failing\n"
    )
    monkeypatch.setattr(pools, "PATH", pools.PATH + "\n" + failing)

    async def use(pool: Pool) -> None:
        parent = pool.parent
        async with pool.reader("me", 0) as reader:
            await reader.ask(READ, body())
        assert pool.parent is parent

    pooled(use)


def test_who_only_waits_is_not_slow() -> None:
    async def use(pool: Pool) -> None:
        async with pool.reader("me", 0) as reader:
            await asyncio.sleep(2 * pools.FAST_S)
            assert not reader.is_slow

    pooled(use)


def test_readers_inherit_nothing_of_each_other_or_of_the_server() -> None:
    async def use(pool: Pool) -> None:
        async with pool.reader("me", 0) as one, pool.reader("me", 0) as other:
            for reader in (one, other):
                await reader.ask(READ, body())
            sockets = [os.readlink(f"/proc/{each.process}/fd/{number}") for each in (one, other)
                       for number in os.listdir(f"/proc/{each.process}/fd") if int(number) > 2]  # fmt: skip
            assert len(sockets) == len(set(sockets)) == 2

    pooled(use)


@pytest.mark.parametrize("name", ["tools", "response_format"])
def test_what_is_large_beside_the_pictures_does_not_reach_the_server(name) -> None:
    async def use(pool: Pool) -> None:
        asked = {**READ, "route": "/v1/chat/completions"}
        image = b'{"role":"user","content":[{"type":"image_url","image_url":"data:;base64,QQ=="}]}'
        for value in (b"[" * 950 + b"]" * 950, b'"' + b"a" * 5_000_000 + b'"'):
            content = b'{"messages":[' + image + b'],"' + name.encode() + b'":' + value + b"}"
            async with pool.reader("me", 0) as reader:
                try:
                    told, _ = await reader.ask(asked, content)
                except ApiError as error:
                    assert error.status in (400, 413)
                else:
                    assert len(str(told)) < 2**22

    pooled(use)


def test_the_readers_import_what_the_server_does_and_nothing_of_the_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "socket.py").write_text("raise SystemExit('another one')")
    (tmp_path / "blip2").mkdir()
    (tmp_path / "blip2/__init__.py").write_text("raise SystemExit('another one')")
    monkeypatch.chdir(tmp_path)

    async def use(pool: Pool) -> None:
        async with pool.reader("me", 0) as reader:
            await reader.ask(READ, body())

    pooled(use)


def test_turns() -> None:
    turns: Turns[str] = Turns()
    for client, item, size in (("a", "a2", 2), ("a", "a1", 1), ("a", "a1b", 1), ("b", "b9", 9), ("c", "c", 0)):
        turns.push(client, item, size)
    turns.remove("c")
    turns.remove("nothing")
    assert turns.peek() == "a1" and len(turns) == 4
    assert [turns.pop() for _ in range(4)] == ["a1", "b9", "a1b", "a2"]
    with pytest.raises(IndexError):
        turns.pop()


def test_what_is_handed_out_goes_to_whose_turn_it_is_and_is_never_lost() -> None:
    async def use() -> None:
        handout = FairPool(["only"])
        got: list[str] = []

        async def take(client: str) -> None:
            async with handout.lease(client):
                got.append(client)
                await asyncio.sleep(0)

        held = await handout.take("first")
        tasks = [asyncio.create_task(take(client)) for client in ("a", "a", "b", "c")]
        await asyncio.sleep(0)
        tasks[3].cancel()
        handout.offer(held)
        tasks[0].cancel()  # it was given, but not taken yet
        await asyncio.gather(*tasks, return_exceptions=True)
        assert got == ["a", "b"] or got == ["b", "a"]
        assert handout.num_waiting == 0 and await handout.take("last") == "only"

    asyncio.run(use())


def test_a_client_that_hangs_up_ends_its_decoding(models) -> None:
    with serving(lambda: models) as server:
        pool = server.service.readings.pool
        eventually(lambda: len(pool.processes) == pools.NUM_FAST)
        before = set(pool.processes)
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/caption", files={"image": SLOW}, timeout=0.5)
        eventually(lambda: server.metric("blip2_requests_in_house") == 0)
        eventually(lambda: not before <= {*pool.processes})
        assert server.http.post("/caption", files={"image": PNG}).status_code == 200


def test_a_request_whose_reader_is_killed_is_read_by_another(models) -> None:
    with serving(lambda: models) as server, ThreadPoolExecutor(1) as threads:
        pool = server.service.readings.pool
        eventually(lambda: len(pool.processes) == pools.NUM_FAST)
        readers = pool.processes
        for process in readers:
            os.kill(process, signal.SIGSTOP)
        answer = threads.submit(server.http.post, "/caption", files={"image": PNG})
        eventually(lambda: server.metric("blip2_requests_in_house") == 1)
        time.sleep(0.1)  # one of them has it now
        for process in readers:
            os.kill(process, signal.SIGKILL)
        assert answer.result().status_code == 200


def test_a_request_whose_time_is_up_ends_its_decoding(models) -> None:
    with serving(lambda: models, limits=Limits(deadline_s=0.5)) as server:
        response = server.http.post("/caption", files={"image": SLOW})
        assert response.status_code == 504
        eventually(lambda: server.http.post("/caption", files={"image": PNG}).status_code == 200)
