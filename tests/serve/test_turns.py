"""Clients go round, also for who looks at all that wait and takes one before its turn."""

from __future__ import annotations

from blip2.serve.turns import Turns


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
