"""What a journal keeps of results, it gives back."""

from __future__ import annotations

from blip2.collection import Journal, Result, Unit


def test_results_of_pictures_that_are_not_there(tmp_path):
    """They have no stamp, and are kept nevertheless."""
    journal = Journal(tmp_path / ".blip2")
    journal.begin({})
    results = [Result("a.png", "", "failed", error_message="no such file"), Result("", "3", "success", text="A cat")]
    part = journal.part(Unit(0, ""))
    for result in results:
        part.add(result, is_new=True)
    part.close()
    assert [result.key for result in journal.earlier()] == ["a.png", ""]
    journal.finish(Unit(0, ""), "stamp", results)
    assert [(result.key, result.stamp) for result in journal.results(Unit(0, ""))] == [("a.png", ""), ("", "3")]
