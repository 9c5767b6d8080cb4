"""A run that stops anywhere and goes on; parts, limits, what failed, who else is at work."""

import json
import threading
from collections import Counter
from itertools import islice

import pytest

from blip2.collection import run
from blip2.collection.journal import Journal
from blip2.collection.request import Request, planned
from blip2.collection.run import Outcome
from blip2.errors import CollectionError, ImageError
from tests.collection.written_by_run import drawn

NAMES = [f"{number % 3}_set/{number:02}.png" for number in range(40)]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """40 images, of which one is damaged, in units of 16."""
    monkeypatch.setattr("blip2.collection.sources.files.UNIT_FILES", 16)
    folder = tmp_path / "photos"
    drawn(folder, *NAMES)
    return folder


class Model:
    """Says names, in batches; ``stops_at``: raises instead of its so many-th word. ``heard``: what it was asked."""

    def __init__(self, batch_size=4, stops_at=None, error=KeyboardInterrupt, knows_all=False):
        self.heard = []
        self._batch_size, self._stops_at, self._error, self._knows_all = batch_size, stops_at, error, knows_all

    def __call__(self, records):
        while batch := list(islice(records, self._batch_size)):
            self.heard += [record.key for record in batch]
            for record in batch:
                if self._stops_at == 0:
                    raise self._error
                self._stops_at = None if self._stops_at is None else self._stops_at - 1
                if record.key.endswith("07.png") and not self._knows_all:
                    yield ImageError(f"{record.name}: damaged")
                else:
                    yield Outcome([f"a {record.key[-6:]}"], [-0.5], [3])


def do(photos, model, **options):
    """What `run` tells of it."""
    options = {"sidecar": ".txt", "output": str(photos / "metadata.jsonl"), **options}
    with planned(Request.of([str(photos)], options)).begun() as job:
        return run(job, model)


def written(photos):
    return {
        str(path.relative_to(photos)): path.read_text()
        for path in sorted(photos.rglob("*"))
        if path.suffix in (".txt", ".jsonl") and ".blip2" not in str(path)
    }


@pytest.fixture
def undisturbed(photos, tmp_path):
    """What a run writes that nothing stops."""
    other = tmp_path / "other"
    drawn(other, *NAMES)
    do(other, Model())
    return written(other)


def test_what_is_written(photos):
    summary = do(photos, Model())
    assert (summary.done, summary.failed, summary.skipped, summary.before) == (39, 1, 0, 0)
    assert summary.reasons == Counter({"damaged": 1}) and summary.is_complete and summary.total == 40
    assert (photos / "1_set" / "01.txt").read_text() == "a 01.png\n"
    assert not (photos / "1_set" / "07.txt").exists()
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 39 and rows[0] == {"file_name": "0_set/00.png", "text": "a 00.png"}
    [error] = (photos / ".metadata.jsonl.blip2" / "errors.jsonl").read_text().splitlines()
    assert json.loads(error)["key"] == "1_set/07.png" and "damaged" in error


@pytest.mark.parametrize("batch_size", [1, 16, 100])
@pytest.mark.parametrize("stops_at", [0, 3, 17, 39])
def test_stopped_while_the_model_is_at_work(photos, undisturbed, stops_at, batch_size):
    first = Model(batch_size, stops_at)
    with pytest.raises(KeyboardInterrupt):
        do(photos, first)
    second = Model()
    summary = do(photos, second)
    assert written(photos) == undisturbed
    assert len(second.heard) == 40 - stops_at and summary.before == stops_at
    assert do(photos, Model(stops_at=0)).before == 40  # all is done: no model is asked


def test_blanks_are_as_they_were_written_when_a_run_goes_on(photos):
    words = {"prefix": "犬\u3000 ", "suffix": " "}
    with pytest.raises(KeyboardInterrupt):
        do(photos, Model(stops_at=7), **words)
    (photos / "0_set" / "00.txt").write_text("by a person\n")
    do(photos, Model(), **words)
    rows = [json.loads(line)["text"] for line in (photos / "metadata.jsonl").read_text().splitlines()]
    assert rows == ["by a person", *(f"犬\u3000 a {name[-6:]} " for name in sorted(NAMES)[1:] if "07" not in name)]
    assert (photos / "0_set" / "03.txt").read_text() == "犬\u3000 a 03.png \n"


@pytest.mark.parametrize("stop", [5, 18, 33])
def test_a_picture_has_the_same_company_however_often_a_run_stops(photos, undisturbed, stop):
    """What a model makes of an image differs in its last digits from batch to batch."""
    batches = []

    def model(records, stops_at=None):
        while batch := records.batch(6):
            batches.append([record.key for record in batch])
            for record in batch:
                if stops_at is not None and (stops_at := stops_at - 1) < 0:
                    raise KeyboardInterrupt
                yield from Model()(iter([record]))

    do(photos, model)
    whole = batches.copy()
    assert [len(batch) for batch in whole] == [6, 6, 4, 6, 6, 4, 6, 2]  # units of 16, 16 and 8
    batches.clear()
    with pytest.raises(KeyboardInterrupt):
        do(photos, lambda records: model(records, stop), restart=True, if_exists="overwrite")
    do(photos, model, if_exists="overwrite", limit=9)
    do(photos, model, if_exists="overwrite")
    assert all(batch in whole for batch in batches) and all(batch in batches for batch in whole)
    assert written(photos) == undisturbed


@pytest.mark.parametrize(
    "place",
    [
        "blip2.collection.sinks.sidecar.write_all",
        "blip2.collection.sinks.table.replacing",
        "blip2.collection.journal.Journal.finish",
        "blip2.collection.journal.Journal.write_errors",
        "blip2.collection.journal.Part.add",
    ],
)
def test_a_disk_that_is_full_at_any_place(photos, undisturbed, monkeypatch, place):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as changed:
        changed.setattr(place, full)
        with pytest.raises(OSError, match="No space"):
            do(photos, Model())
    do(photos, Model())
    assert written(photos) == undisturbed


def test_a_limit_does_so_many_and_the_next_run_goes_on(photos, undisturbed):
    models = [Model(), Model(), Model()]
    first = do(photos, models[0], limit=5)
    assert first.is_limited and not first.is_complete and first.done == 5
    assert len((photos / "metadata.jsonl").read_text().splitlines()) == 5
    do(photos, models[1], limit=20)
    do(photos, models[2])
    assert [len(model.heard) for model in models] == [5, 20, 15]
    assert written(photos) == undisturbed
    assert do(photos, Model(stops_at=0), limit=5).is_complete


def test_a_limit_that_is_reached_where_a_unit_ends(photos, undisturbed):
    first = do(photos, Model(), limit=16)
    assert first.is_limited and first.done == 16
    assert len((photos / "metadata.jsonl").read_text().splitlines()) == 16
    do(photos, Model())
    assert written(photos) == undisturbed


def test_parts_make_one_output(photos, undisturbed):
    heard = []
    for number in (2, 1, 3):
        assert not (photos / "metadata.jsonl").exists()
        model = Model()
        summary = do(photos, model, shard=(number, 3))
        heard += model.heard
        assert summary.is_complete == (number == 3)
    assert len(heard) == len({*heard}) == 40
    assert written(photos) == undisturbed


def test_what_failed_is_done_again_when_that_is_asked(photos):
    do(photos, Model())
    model = Model(knows_all=True)
    assert do(photos, model).failed_before == 1 and model.heard == []
    summary = do(photos, model, retry_failed=True)
    assert model.heard == ["1_set/07.png"] and (summary.done, summary.before) == (1, 39)
    assert (photos / "1_set" / "07.txt").read_text() == "a 07.png\n"
    assert not (photos / ".metadata.jsonl.blip2" / "errors.jsonl").exists()


def test_new_pictures_alone_are_looked_at(photos):
    do(photos, Model())
    drawn(photos, "0_set/00a.png")  # shifts all units
    model = Model()
    do(photos, model)
    assert model.heard == ["0_set/00a.png"]
    assert len((photos / "metadata.jsonl").read_text().splitlines()) == 40


def test_another_command_is_told_the_difference(photos):
    do(photos, Model())
    with pytest.raises(CollectionError, match=r'prefix was not given and is "sks, "') as caught:
        do(photos, Model(), prefix="sks, ")
    assert "set restart=True" in str(caught.value)
    model = Model()
    do(photos, model, prefix="sks, ", restart=True, if_exists="overwrite")
    assert len(model.heard) == 40 and (photos / "0_set" / "00.txt").read_text() == "sks, a 00.png\n"


def test_a_start_that_came_to_nothing_blocks_no_other_command(photos, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        do(photos, Model(stops_at=0), prefix="sks, ")
    do(photos, Model())
    assert written(photos) == undisturbed
    with pytest.raises(CollectionError, match="started by another command"):
        do(photos, Model(), prefix="sks, ")


def test_nor_does_one_that_skipped_all_or_could_read_nothing(photos):
    for number, path in enumerate(photos.rglob("*.png")):
        path.with_suffix(".txt").write_text("by hand") if number % 2 else path.with_suffix(".txt").write_bytes(b"\0")
    summary = do(photos, Model(stops_at=0))
    assert (summary.skipped, summary.failed) == (20, 20)
    with planned(Request.of([str(photos)], {"sidecar": ".txt", "if_exists": "overwrite"})).begun():
        pass
    for path in photos.rglob("*.txt"):
        path.unlink()
    model = Model()
    assert do(photos, model, if_exists="overwrite").done == 39 and len(model.heard) == 40


def test_what_it_found_of_a_model_is_forgotten(tmp_path):
    journal = Journal(tmp_path / ".blip2")
    journal.begin({"model": "m"})
    journal.agree("the model's files", "half of them")
    journal.begin({"model": "m"})
    journal.agree("the model's files", "all of them")


def test_a_part_that_is_at_work_has_come_to_something(photos):
    request = Request.of([str(photos)], {"sidecar": ".txt", "shard": (1, 2)})
    with planned(request).begun(), pytest.raises(CollectionError, match="started by another command"):
        do(photos, Model(), output="", shard=(2, 2), prefix="sks, ")
    do(photos, Model(), output="", shard=(2, 2), prefix="sks, ")


def test_what_a_person_put_in_the_place_of_an_output_after_a_failed_start(photos):
    with pytest.raises(KeyboardInterrupt):
        do(photos, Model(stops_at=0), output=str(photos.parent / "all.jsonl"))
    (photos.parent / "all.jsonl").write_text("mine")
    for restart in (False, True):
        with pytest.raises(CollectionError, match="exists, and was not made by this command"):
            do(photos, Model(), output=str(photos.parent / "all.jsonl"), restart=restart)
    assert (photos.parent / "all.jsonl").read_text() == "mine"


def test_an_output_that_a_person_changed_is_kept(photos):
    do(photos, Model())
    table = photos / "metadata.jsonl"
    table.write_text(table.read_text().replace("a 00.png", "my own words"))
    with pytest.raises(CollectionError, match="has changed since it was written"):
        do(photos, Model())
    assert "my own words" in table.read_text()
    model = Model()
    do(photos, model, restart=True)
    assert "my own words" in table.read_text() and model.heard == ["1_set/07.png"]


def test_a_restart_that_is_stopped_does_not_take_its_own_output_for_words_of_people(photos, undisturbed):
    options = {"sidecar": "", "output": str(photos / "metadata.jsonl")}
    do(photos, Model(), **options)
    with pytest.raises(KeyboardInterrupt):
        do(photos, Model(stops_at=10), restart=True, **options)
    model = Model()
    do(photos, model, **options)
    assert len(model.heard) == 30
    assert (photos / "metadata.jsonl").read_text() == undisturbed["metadata.jsonl"]


def test_two_runs_on_one_output_notice_each_other(photos):
    begun, end = threading.Event(), threading.Event()

    def waiting(records):
        begun.set()
        end.wait(20)
        yield from Model()(records)

    one = threading.Thread(target=do, args=(photos, waiting))
    one.start()
    try:
        assert begun.wait(20)
        for shard in (None, (1, 2)):
            with pytest.raises(CollectionError, match="another run is writing"):
                do(photos, Model(), shard=shard)
    finally:
        end.set()
        one.join()
    assert do(photos, Model()).before == 40


def test_another_model_under_the_same_name(tmp_path):
    journal = Journal(tmp_path / ".blip2")
    journal.begin({"model": "m"})
    journal.agree("the model", "1")
    journal.begin({"model": "m"})
    journal.agree("the model", "1")
    with pytest.raises(CollectionError, match='the model was "1" and is "2"'):
        journal.agree("the model", "2")


def test_what_is_skipped_is_what_would_be_written_over(photos, tmp_path):
    names = ["0_set/00.png", "1_set/01.png"]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"image": f"photos/{name}", "caption": "of the row"}) + "\n" for name in names))
    (photos / names[0]).with_suffix(".txt").write_text("by hand")

    def texts(output="", **options):
        options = {"sidecar": ".txt", "output": output, **options}
        plan = planned(Request.of([str(table)], options))
        listed = [what for _, what in plan.listed()]
        with plan.begun() as job:
            summary = run(job, Model())
        assert listed.count("skipped") == summary.skipped
        found = [(photos / name).with_suffix(".txt") for name in names]
        return [path.read_text() if path.exists() else None for path in found]

    assert texts(template="{caption} ({old})") == ["by hand", "a 01.png (of the row)\n"]
    (photos / names[1]).with_suffix(".txt").unlink()
    assert texts(if_exists="append", restart=True) == ["by hand, a 00.png\n", "of the row, a 01.png\n"]
    (photos / names[1]).with_suffix(".txt").unlink()
    assert texts(str(tmp_path / "all.jsonl")) == ["by hand, a 00.png\n", None]
    rows = [json.loads(line)["text"] for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert rows == ["by hand, a 00.png", "of the row"]
