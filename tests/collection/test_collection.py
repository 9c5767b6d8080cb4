from pathlib import Path
import shutil
import blip2, json
from blip2.collection import Job, Journal, run
from blip2.collection.run import Outcome
from blip2.collection.sinks.sidecar import Sidecars
from blip2.collection.sinks.lines import FORMATS
from blip2.collection.sinks.table import Table
from blip2.collection.sources.files import Files

def test_slice(tmp_path):
    calls = []
    for n in range(40):
        (tmp_path / f"{n:03}.jpg").write_bytes(b"x" * n)
    (tmp_path / "003.txt").write_text("old")
    paths = sorted(map(str, tmp_path.glob("*.jpg")))
    def work(records, stop=None):
        for i, r in enumerate(records):
            calls.append(r.key)
            if stop and i == stop:
                raise KeyboardInterrupt
            yield Outcome([f"caption {r.key}"], [0.0], [3])
    def job():
        source = Files(paths, root=str(tmp_path), text_suffix=".txt")
        return Job(source, [Sidecars(".txt"), Table(tmp_path / "m.jsonl", FORMATS["imagefolder"])], Journal(tmp_path / ".blip2"), lambda r, o: o.captions[0], {})
    j = job(); j.journal.begin({})
    try: run(j, lambda r: work(r, 20))
    except KeyboardInterrupt: pass
    s = run(job(), work)
    print(s, len(calls))
    assert (tmp_path / "m.jsonl").read_text().count("\n") == 40
    assert (tmp_path / "003.txt").read_text() == "old"
    print(run(job(), work))
