"""The devices or machines that process a collection, with either kind of worker."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch

from blip2.api.worker import Order
from blip2.collection.dispatch import Workers, dispatch
from blip2.collection.record import Source, Unit
from blip2.collection.run import Job, Known, Tell, Work
from blip2.errors import OptionError, option
from blip2.installed import install_line

if TYPE_CHECKING:
    from blip2.api.collect import Model


@dataclass(frozen=True, kw_only=True)
class Machines:
    """``devices``: of this machine, with a worker on each ("0,1", "cuda:1", "cpu,cpu"); or ``engine`` "ray" with
    ``replicas`` workers, on the cluster at ``address`` or on this machine. With neither, there are no workers."""

    devices: str | Sequence[str] | None = None
    engine: Literal["ray"] | None = None
    replicas: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in (None, "ray"):
            raise OptionError(f"{option('engine')} is {self.engine!r}; use 'ray'")
        for name in ("replicas", "address"):
            if self.engine is None and getattr(self, name) is not None:
                raise OptionError(f"{option(name)} needs {option('engine')} ray; add that, or leave it out")
        if self.devices is not None and self.engine is not None:
            raise OptionError(f"{option('devices')} and {option('engine')} exclude each other; leave out one")
        if self.replicas is not None and self.replicas < 1:
            raise OptionError(f"{option('replicas')} is {self.replicas}; use 1 or more")
        if self.engine is not None and find_spec("ray") is None:
            raise OptionError(f"{option('engine')} ray needs more packages; {install_line('ray')}")
        if self.devices is not None and not self.each_device:
            raise OptionError(f"{option('devices')} is empty; give numbers of GPUs such as 0,1, or cpu,cpu")
        for device in self.each_device:
            _check(device)

    @classmethod
    def of(cls, options: dict[str, Any]) -> Machines:
        """Take its options out of the options of a command."""
        return cls(**{each.name: options.pop(each.name) for each in fields(cls) if each.name in options})

    def __bool__(self) -> bool:
        return self.devices is not None or self.engine is not None

    @property
    def each_device(self) -> list[str]:
        """["cuda:0", "cuda:1"] of "0,1"."""
        given = self.devices.split(",") if isinstance(self.devices, str) else self.devices or ()
        names = [str(name).strip() for name in given]
        return [f"cuda:{name}" if name.isdecimal() else name for name in names]

    def check(self, model: Model, source: Source, limit: int | None) -> None:
        """Check that the options allow workers. Raises OptionError."""
        if not self:
            return
        here = option("devices" if self.devices is not None else "engine")
        if model.loaded is not None:
            raise OptionError(f"{here} loads a model in each worker; give the model's name, not a loaded model")
        if limit is not None:
            raise OptionError(f"{option('limit')} does not work with workers; leave out {here} to try a few images")
        if self.devices is not None and model.options.get("device", "auto") != "auto":
            raise OptionError(f"{here} and {option('device')} exclude each other; leave out one")
        if "-" in (getattr(source, "paths", None) or ()):
            raise OptionError(f"standard input cannot be used with {here}; give a file instead")

    def do(
        self, job: Job, model: Model, work: Callable[[Callable[[Model], Any]], Work]
    ) -> Callable[[Sequence[Unit], Known, Tell], bool]:
        """The function for `run_by`."""

        def doing(units: Sequence[Unit], known: Known, tell: Tell) -> bool:
            number = len(self.each_device) or self.replicas or 1
            is_chosen = "OMP_NUM_THREADS" in os.environ
            threads = None if is_chosen else max(torch.get_num_threads() // number, 1)
            order = Order(job, known, model, work, os.getcwd(), _sample_path(job.source, units), threads)
            dispatch(job, self._workers(pickle.dumps(order), number, model), units, tell)
            return False

        return doing

    def _workers(self, order: bytes, number: int, model: Model) -> Workers:
        if self.engine is None:
            from blip2.api.devices import Processes

            return Processes(order, self.each_device)
        from blip2.api.cluster import Actors

        return Actors(order, number, self.address, str(model.options.get("device", "auto")))


MACHINES = tuple(each.name for each in fields(Machines))


def _check(device: str) -> None:
    """Check that a device exists, without allocating memory on it. Raises OptionError."""
    if device == "cpu":
        return
    if (found := re.fullmatch(r"cuda:(\d{1,3})", device)) is None:
        raise OptionError(f"{option('devices')} {device!r} is no device; give numbers of GPUs such as 0,1, or cpu,cpu")
    if (count := torch.cuda.device_count()) <= int(found[1]):
        there = f"the last one is {count - 1}" if count else "there is no GPU"
        raise OptionError(f"{option('devices')} names {device}, but {there}; leave it out")


def _sample_path(source: Source, units: Sequence[Unit]) -> str:
    """A path of the source that exists; "" if it has none."""
    paths = [units[0].place, *(getattr(source, "paths", None) or ())[:16]]
    return next((path for path in paths if path and os.path.exists(path)), "")
