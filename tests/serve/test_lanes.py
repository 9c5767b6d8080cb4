"""Who asks little is not held up by who asks much: which rows and which share of the models' time each is given."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from blip2.generation import GenerateOptions
from blip2.serve.cache import Look
from blip2.serve.lanes import Lanes, Share, next_of
from blip2.serve.limits import Limits
from blip2.serve.metrics import Metrics
from blip2.serve.tickets import Steps, Ticket
from blip2.serve.turns import Turns
from blip2.serve.worker import Worker
from tests.serve.conftest import eventually


def ticket(client: str, num_beams: int = 1, tokens: int = 20) -> Ticket:
    options = GenerateOptions(num_beams=num_beams, max_new_tokens=tokens, min_new_tokens=tokens)
    return Ticket(Look("an image", None), "", options, client=client)


class LanesUnderTest:
    """Lanes, and those who wait for a place."""

    def __init__(self, max_rows: int = 64) -> None:
        language: Any = None  # nothing is computed here
        self.lanes = Lanes(language, max_rows)
        self.waiting: Turns[Ticket] = Turns()

    def come(self, *tickets: Ticket) -> None:
        for each in tickets:
            self.waiting.push(each.client, each)
        self.lanes.allot(self.waiting)

    def leave(self, *tickets: Ticket) -> None:
        for lane in self.lanes.each:
            for each in tickets:
                if each in lane.coming:
                    lane.coming.remove(each)
        self.lanes.allot(self.waiting)

    @property
    def quick(self) -> list[Ticket]:
        return list(self.lanes.quick.coming)

    @property
    def bulk(self) -> list[Ticket]:
        return list(self.lanes.bulk.coming)


# ---- rows ---------------------------------------------------------------------------------------------------


def test_a_search_that_takes_all_rows_leaves_room_for_captions_of_anybody() -> None:
    waiting_room = LanesUnderTest()
    wide, same, other = ticket("a", 64), ticket("a", 5), ticket("b", 5)
    waiting_room.come(wide, next_wide := ticket("a", 64), same, other)
    assert waiting_room.bulk == [wide] and waiting_room.quick == [other, same]
    waiting_room.leave(wide)
    assert waiting_room.bulk == [next_wide] and waiting_room.quick == [other, same]


def test_what_a_client_asks_beyond_a_few_rows_is_written_in_bulk_until_it_is_done() -> None:
    waiting_room = LanesUnderTest()
    many = [ticket("a") for _ in range(12)]
    waiting_room.come(*many)
    assert waiting_room.quick == many[:8] and waiting_room.bulk == many[8:]
    waiting_room.leave(*many[:8])
    more, other = ticket("a"), ticket("b")
    waiting_room.come(more, other)
    assert waiting_room.quick == [other] and more in waiting_room.bulk
    waiting_room.leave(*many[8:], more)
    waiting_room.come(again := ticket("a"))
    assert waiting_room.quick == [other, again]


def test_long_answers_count_for_more() -> None:
    waiting_room = LanesUnderTest()
    waiting_room.come(first := ticket("a", tokens=512), second := ticket("a", tokens=512))
    assert waiting_room.quick == [first] and waiting_room.bulk == [second]


def test_who_needs_many_rows_is_overtaken_but_not_for_ever() -> None:
    waiting_room = LanesUnderTest()
    running = [ticket("a", 16) for _ in range(4)]
    waiting_room.come(*running)
    wide, others = ticket("a", 64), [ticket("b", 16) for _ in range(12)]
    waiting_room.come(wide, *others)
    for _ in range(8):
        assert wide not in waiting_room.bulk
        waiting_room.leave(waiting_room.bulk[0])
    assert waiting_room.bulk == [wide]
    assert sum(each not in waiting_room.waiting for each in others) == 4  # as many rows as there are


def test_few_rows_are_dealt_out_in_turn() -> None:
    waiting_room = LanesUnderTest(max_rows=2)
    mine, yours = [ticket("a") for _ in range(4)], [ticket("b") for _ in range(2)]
    waiting_room.come(*mine, *yours)
    assert waiting_room.bulk == [mine[0], yours[0]] and not waiting_room.quick
    waiting_room.leave(mine[0])
    assert waiting_room.bulk == [yours[0], mine[1]]


# ---- time ---------------------------------------------------------------------------------------------------


def test_time_is_shared_by_weight_and_not_saved_up() -> None:
    quick, bulk, calls = shares = Share(2), Share(1), Share(1)

    def run(busy: list[Share], costs: dict[int, float], seconds: float) -> dict[int, float]:
        spent = dict.fromkeys(map(id, shares), 0.0)
        while sum(spent.values()) < seconds:
            share = next_of(shares, busy)
            share.spent_s += costs[id(share)] / share.weight
            spent[id(share)] += costs[id(share)]
        return spent

    costs = {id(quick): 1.0, id(bulk): 7.0, id(calls): 3.0}
    alone = run([bulk], costs, 1000)
    assert alone[id(bulk)] >= 1000
    together = run([quick, bulk], costs, 300)
    assert together[id(quick)] == pytest.approx(200, abs=8)
    assert run(list(shares), costs, 400)[id(quick)] == pytest.approx(200, abs=8)
    # Who was idle for long has no claim to all of the time from now on.
    assert run([bulk, calls], costs, 100)[id(calls)] == pytest.approx(50, abs=8)


@pytest.fixture
def worker(tiny_models):
    found = Worker(tiny_models.pipeline, tiny_models.matcher, Limits(), Metrics())
    yield found
    found.close(10)


def seen(worker: Worker, client: str, num_beams: int, tokens: int) -> Ticket:
    found = ticket(client, num_beams, tokens)
    size = worker.pipeline.frontend.size
    found.look = Look(client, torch.zeros(3, size, size))
    return found


def test_a_caption_beside_64_beams_does_not_wait_for_their_end(worker, monkeypatch) -> None:
    language = worker.pipeline.speaker.engine.language
    plain_step = language.step
    rows: list[int] = []

    def step(tokens: torch.Tensor, state: Any) -> torch.Tensor:
        rows.append(len(tokens))
        return plain_step(tokens, state)

    monkeypatch.setattr(language, "step", step)
    wide = seen(worker, "a", 64, 90)
    worker.submit(wide)
    eventually(lambda: 64 in rows)
    for client in ("b", "a"):
        short = seen(worker, client, 1, 10)
        worker.submit(short)
        [answer] = short.answers.result(20)
        assert len(answer.tokens) == 10 and not wide.answers.done()
    assert rows.count(1) == 2 * 9 and 65 not in rows  # it was written beside them, not with them
    worker.cancel(wide)
    eventually(lambda: not worker._lanes.is_busy)


def test_a_call_is_done_in_portions_between_which_others_have_their_turn(worker) -> None:
    answered = threading.Event()

    def work() -> Steps[str]:
        while not answered.is_set():
            yield
        return "done"

    told = worker.call("a", work())
    short = seen(worker, "a", 1, 5)
    short.answers.add_done_callback(lambda _: answered.set())
    worker.submit(short)
    assert told.result(20) == "done" and short.answers.done()


def test_calls_of_clients_take_turns_and_one_client_has_one_at_a_time(worker) -> None:
    order: list[str] = []
    may_begin = threading.Event()

    def hold() -> Steps[None]:
        may_begin.wait(10)
        yield

    def work(name: str) -> Steps[None]:
        for _ in range(3):
            order.append(name)
            yield

    held = worker.call("first", hold())
    calls = [worker.call(name[0], work(name)) for name in ("a1", "a2", "b1")]
    may_begin.set()
    for each in (held, *calls):
        each.result(20)
    assert order == ["a1", "b1", "a1", "b1", "a1", "b1", "a2", "a2", "a2"]


def test_a_call_that_nobody_waits_for_ends_after_its_portion(worker) -> None:
    begun, ended = threading.Event(), threading.Event()

    def work() -> Steps[None]:
        try:
            while True:
                begun.set()
                yield
        finally:
            ended.set()

    told = worker.call("a", work())
    assert begun.wait(10)
    assert told.cancel() and ended.wait(10)
    with pytest.raises(CancelledError):
        told.result()

    def fail() -> Steps[None]:
        yield
        raise KeyError("of its own")

    with pytest.raises(KeyError):
        worker.call("a", fail()).result(10)
    assert worker.is_alive
