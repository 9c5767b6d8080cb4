"""Clients go round, also for who looks at all that wait and takes one before its turn."""

from __future__ import annotations

import asyncio

from blip2.serve.turns import ReservingPool, Turns


def filled() -> Turns[str]:
    turns: Turns[str] = Turns()
    for client, item, size in (("a", "a2", 2), ("a", "a1", 1), ("a", "a3", 3), ("b", "b1", 9), ("c", "c1", 0)):
        turns.push(client, item, size)
    return turns


def test_what_is_looked_at_in_turn_is_what_would_come() -> None:
    turns = filled()
    expected = list(turns.in_turn())
    assert expected == ["a1", "b1", "c1", "a2", "a3"] and sorted(turns) == sorted(expected)
    assert [turns.pop() for _ in expected] == expected and list(turns.in_turn()) == []


def test_whose_item_is_taken_has_had_the_turn() -> None:
    turns = filled()
    turns.take("a2")
    assert list(turns.in_turn()) == ["b1", "c1", "a1", "a3"]
    turns.take("b1")
    assert list(turns.in_turn()) == ["c1", "a1", "a3"] and len(turns) == 3


def test_the_last_one_that_is_free_is_for_who_has_none() -> None:
    async def run() -> None:
        spared = ReservingPool(range(3))
        taken = [await spared.take("many") for _ in range(2)]
        more = [asyncio.create_task(spared.take("many")) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(each.done() for each in more) and spared.num_free == 1
        one = await spared.take("one")
        spared.offer(one)
        await asyncio.sleep(0)
        assert not any(each.done() for each in more) and spared.num_free == 1
        spared.forget(taken[0])  # it does not count any more, but is not free either
        await asyncio.sleep(0)
        assert not any(each.done() for each in more)
        spared.offer(taken[0])
        await asyncio.sleep(0)
        assert [each.done() for each in more] == [True, False, False]
        more[1].cancel()
        spared.offer(taken[1])
        await asyncio.sleep(0)
        assert more[2].done() and spared.num_free == 1

    asyncio.run(run())
