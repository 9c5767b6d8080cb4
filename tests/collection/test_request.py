"""What is asked of a run, read from words."""

import pytest

from blip2.collection.request import shard_of, shard_of_array
from blip2.errors import OptionError


def test_shards_of_slurm():
    def task(number, first=0, count=4, last=3):
        told = {"ID": number, "MIN": first, "COUNT": count, "MAX": last}
        return shard_of_array({f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in told.items()})

    assert shard_of_array({}) is None and task(0, count=1, last=0) is None
    assert [task(number) for number in range(4)] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert task(15, first=10, count=3, last=20) == (2, 3)  # --array=10-20:5
    with pytest.raises(OptionError, match="without an equal step"):
        task(3, first=1, count=3, last=9)  # --array=1,3,9
    assert shard_of("3/16") == (3, 16)
    for wrong in ("3", "3/", "a/b", "-1/3"):
        with pytest.raises(OptionError, match="such as 3/16"):
            shard_of(wrong)
