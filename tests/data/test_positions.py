"""Places that are found once and kept: by whom, for what, and what is damaged."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2.data import positions
from blip2.data.positions import LeftOut, Position, kept_positions
from blip2.errors import RecipeError

POSITIONS = st.builds(Position, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**63))


@given(wanted=st.lists(POSITIONS, max_size=20), kept=st.integers(1, 5))
def test_what_was_found_is_read(tmp_path_factory, wanted, kept):
    path = tmp_path_factory.mktemp("kept") / "a.positions"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions, "KEPT_RECORDS", kept)
        kept_positions(path, {"files": ["a"]}, lambda: iter(wanted))
    found, is_new = kept_positions(path, {"files": ["a"]}, lambda: pytest.fail("they are there"))
    assert [found[number] for number in range(len(found))] == wanted and not is_new


def test_what_was_left_out_is_kept_too(tmp_path):
    path = tmp_path / "a.positions"
    some = [LeftOut("no text", "a:1"), Position(0, 1, 2), LeftOut("no text", "a:3")]
    assert kept_positions(path, {"files": 1}, lambda: iter(some))[0].left_out == {"no text": (2, "a:1")}
    found, _ = kept_positions(path, {"files": 1}, lambda: pytest.fail("they are there"))
    assert found.left_out == {"no text": (2, "a:1")} and len(found) == 1


def test_of_several_processes_one_finds_and_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(positions, "WAIT_S", 0.01)
    searches, results = [], []

    def find():
        searches.append(1)
        time.sleep(0.1)
        yield Position(0, 5, 7)

    def ask():
        results.append(kept_positions(tmp_path / "a.positions", {"files": 1}, find))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(searches) == 1
    assert [found[0] for found, _ in results] == [Position(0, 5, 7)] * 4
    assert sorted(is_new for _, is_new in results) == [False, False, False, True]


def test_a_search_that_is_ended_leaves_nothing(tmp_path):
    path = tmp_path / "a.positions"

    def find():
        yield Position(0, 1, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_positions(path, {"files": 1}, find)
    assert not path.exists()
    assert kept_positions(path, {"files": 1}, lambda: iter([Position(0, 1, 2)]))[1]


def test_where_they_cannot_be_kept(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="cannot be written"):
        kept_positions(tmp_path / "file" / "a.positions", {"files": 1}, lambda: iter([]))
