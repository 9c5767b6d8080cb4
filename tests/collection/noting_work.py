"""A worker's model that is a function of names, and notes each batch with its process."""

import os
import time

from blip2.collection.run import Outcome

BATCH_SIZE = 4


def noting(notes, pause_s, get):
    """`CollectionRun.work`, when the first two are given."""

    def work(records):
        while batch := records.batch(BATCH_SIZE):
            with open(notes, "a", encoding="utf-8") as file:
                file.write("".join(f"{os.getpid()} {record.key}\n" for record in batch))
            time.sleep(pause_s)
            for record in batch:
                if record.key.endswith("13.png") and os.path.exists(f"{notes}.deadly"):
                    os._exit(9)
                yield Outcome([f"a {record.key.rpartition('/')[2]}"], [-0.5], [4])

    return work


def unloadable(get):
    raise AssertionError("is made in a worker, and its error is told")
