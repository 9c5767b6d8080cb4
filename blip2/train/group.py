"""The processes of one training, one device each: which rows of a batch each process computes, and how the processes
communicate.

All processes hold the same weights and do the same steps. ``torchrun`` or `blip2.train.launch` starts them and sets
their ranks in the environment. B rows of the global batch; N rows of this process; X any axes.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from blip2.errors import Blip2Error, RecipeError

LAUNCHED = "BLIP2_LAUNCHED"
"""Set in the environment of the processes that `blip2.train.launch` has started."""
TIMEOUT_S = 600.0
"""Time limit for a collective operation; the first preparation may take longer."""
PATIENCE = timedelta(days=30)
POLL_S = 0.1
FAILED = -(2**40)
"""Added to a shared sum to make it negative: a process has failed."""
T = TypeVar("T")


class ProcessLost(Blip2Error):
    """Another process of the training has ended or does not answer."""


class OtherProcessFailed(Blip2Error):
    """The training has ended because of an error that another process reports."""


@dataclass(frozen=True)
class Group:
    """This process has ``rank`` of ``size`` processes. All of them make the same calls in the same order."""

    rank: int = 0
    size: int = 1
    store: Any = None
    """Key-value store for messages outside of collective operations; None with a single process."""
    _turns: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """The rows of ``count`` that a process has, by default this one. Shares differ by at most one row."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def parts(self, count: int, number: int) -> list[range]:
        """This process's share of ``count`` rows in ``number`` parts, or fewer if some process has fewer rows. All
        processes have the same number of parts, because each part includes collective operations."""
        return parts_of(self.share(count), min(number, count // self.size))

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce: the sum over all processes, in place."""
        if self.size > 1:
            with _lost(self):
                dist.all_reduce(tensor)
        return tensor

    def most(self, number: int) -> int:
        """The maximum over all processes."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        with _lost(self):
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gather(self, rows_NX: Tensor, count: int) -> Tensor:
        """The ``count`` rows of the global batch ``[B, ...]``, gathered from all processes. Without gradient."""
        if self.size == 1:
            return rows_NX.detach()
        shares = [len(self.share(count, rank)) for rank in range(self.size)]
        given = rows_NX.new_zeros(max(shares), *rows_NX.shape[1:])
        given[: len(rows_NX)] = rows_NX.detach()
        found = [torch.empty_like(given) for _ in shares]
        with _lost(self):
            dist.all_gather(found, given)
        return torch.cat([rows[:size] for rows, size in zip(found, shares, strict=True)])

    def fetch(self, rows_NX: Tensor, wanted_B: Sequence[int]) -> Tensor:
        """Rows of the global batch ``[N, ...]`` that this process wants; only wanted rows are sent. Without gradient,
        which `give_back` returns.

        ``wanted_B``: for each row of the global batch, the row that its owner wants.
        """
        sent, received = self._travels(wanted_B)
        if self.size == 1:
            return rows_NX[sent[0]]
        found = self._exchange(rows_NX[[row for rows in sent for row in rows]], sent, received)
        ordered = torch.empty_like(found)
        ordered[[place for places in received for place in places]] = found
        return ordered

    def return_rows(self, rows_NX: Tensor, wanted_B: Sequence[int]) -> Tensor:
        """The reverse of `fetch`, for gradients: for each own row ``[N, ...]``, the sum over all places that fetched
        it."""
        sent, received = self._travels(wanted_B)
        found = self._exchange(rows_NX[[place for places in received for place in places]], received, sent)
        return torch.zeros_like(rows_NX).index_add_(
            0, torch.tensor([row for rows in sent for row in rows], dtype=torch.long, device=found.device), found
        )

    def _travels(self, wanted_B: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        """What is exchanged with each process: the own rows that it wants, and the own places that want one of its
        rows."""
        own = self.share(len(wanted_B))
        shares = [self.share(len(wanted_B), rank) for rank in range(self.size)]
        sent = [[wanted_B[row] - own.start for row in share if wanted_B[row] in own] for share in shares]
        received = [[place for place, row in enumerate(own) if wanted_B[row] in share] for share in shares]
        return sent, received

    def _exchange(self, rows_NX: Tensor, sent: list[list[int]], received: list[list[int]]) -> Tensor:
        """All-to-all: send rows in the order of the receiving processes, return rows in the order of the sending
        ones."""
        given = rows_NX.detach().contiguous()
        if self.size == 1:
            return given
        found = given.new_empty(sum(map(len, received)), *given.shape[1:])
        with _lost(self):
            dist.all_to_all_single(found, given, [len(places) for places in received], [len(rows) for rows in sent])
        return found

    def objects(self, own: T) -> list[T]:
        """The objects of all processes, by rank."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        with _lost(self):
            dist.all_gather_object(found, own)
        return found

    def is_any(self, own: bool) -> bool:
        return bool(self.most(int(own)))

    @contextmanager
    def together(self) -> Iterator[None]:
        """If one process fails inside, all of them end: the others raise `OtherProcessFailed`."""
        try:
            yield
        except Exception:
            with suppress(ProcessLost):  # the first error is the one to report
                self.is_any(True)
            raise
        if self.is_any(False):
            raise OtherProcessFailed("another process reports the error")

    @contextmanager
    def in_turn(self, name: str, *, is_one_enough: bool = False) -> Iterator[None]:
        """One process after the other, or the first and then all others (``is_one_enough``). Without a time limit. If a
        process fails, those after it raise `OtherProcessFailed`."""
        if self.size == 1:
            yield
            return
        name = f"{name}/{next(self._turns)}"
        before = 0 if is_one_enough else self.rank - 1
        if self.rank > 0:
            with _lost(self):
                self.store.wait([f"{name}/{before}"], PATIENCE)
                has_failed = self.store.get(f"{name}/{before}") != b"done"
            if has_failed:
                self.store.set(f"{name}/{self.rank}", "failed")
                raise OtherProcessFailed(f"process {before} of {self.size} reports the error")
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            with _lost(self):
                self.store.set(f"{name}/{self.rank}", outcome)

    @contextmanager
    def at_once(self, name: str) -> Iterator[Callable[[int], int]]:
        """Each process at its own pace until all are done, without a time limit. Yields a function that adds to a
        shared sum and returns it. If a process fails, the next call of it raises `OtherProcessFailed` in the others."""
        name, own = f"{name}/{next(self._turns)}", 0

        def add(number: int, to: str = "sum") -> int:
            nonlocal own
            if self.size == 1:
                own += number
                return own
            with _lost(self):
                return int(self.store.add(f"{name}/{to}", number))

        def add_unless_failed(number: int) -> int:
            if (total := add(number)) < 0:
                raise OtherProcessFailed("another process reports the error")
            return total

        try:
            yield add_unless_failed
        except BaseException:
            with suppress(ProcessLost):  # the first error is the one to report
                add(FAILED)
            raise
        if self.size > 1:
            add(1, "done")
            while add(0, "done") < self.size:
                add_unless_failed(0)
                time.sleep(POLL_S)


@dataclass(frozen=True)
class Step:
    """What a stage needs to know about a training step. All randomness in it follows from ``seed``."""

    seed: int
    batch_size: int
    """Size of the global batch."""
    autocast: Callable[[], AbstractContextManager]
    generator: torch.Generator
    """Has the same seed in all processes."""
    group: Group = field(default_factory=Group)

    @property
    def share(self) -> range:
        """The rows of the global batch that belong to this process."""
        return self.group.share(self.batch_size)


def parts_of(rows: range, count: int) -> list[range]:
    """``count`` parts of rows whose sizes differ by at most one; fewer parts if there are fewer rows."""
    count = min(count, len(rows))
    return [rows[len(rows) * part // count : len(rows) * (part + 1) // count] for part in range(count)]


def check_alike(group: Group, step: int, parameters: dict[str, nn.Parameter]) -> None:
    """Raises RecipeError unless all processes begin at the same step with the same weights."""
    if group.size == 1:
        return
    with torch.no_grad():
        weights = [parameter for parameter in parameters.values() if not hasattr(parameter, "full_tensor")]
        weight = sum(parameter.double().sum().item() for parameter in weights)
    first, *others = group.objects((step, len(parameters), weight))
    for rank, found in enumerate(others, start=1):
        if found != first:
            raise RecipeError(
                f"process {rank} begins at step {found[0]}, process 0 at step {first[0]}, or their weights differ; "
                "give all processes the same folders as 'start' and 'out'"
            )


def group_of_environment() -> Group:
    """The group that the environment describes: a single process unless WORLD_SIZE is set. Raises RecipeError for an
    incomplete environment."""
    variables = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    if variables["WORLD_SIZE"] in ("", "1"):
        return Group()
    try:
        group = Group(int(variables["RANK"]), int(variables["WORLD_SIZE"]))
        if 0 <= group.rank < group.size and all(variables.values()):
            return group
    except ValueError:
        pass
    found = ", ".join(f"{name}={value}" for name, value in variables.items())
    raise RecipeError(f"the environment has {found}; start with torchrun or with --devices, or unset WORLD_SIZE")


def end_with_launcher() -> None:
    """If `blip2.train.launch` started this process, save and stop as soon as the launcher has ended for any reason."""
    if LAUNCHED not in os.environ:
        return

    def wait() -> None:
        os.read(0, 1)  # nothing is ever written; read returns when the launcher ends
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def joined(
    device: torch.device, *, together: tuple[type[Exception], ...] = (), timeout_s: float = TIMEOUT_S
) -> Iterator[Group]:
    """Connect the processes of the environment: gloo on the CPU, nccl for tensors on a GPU. An error is reported by one
    process, with its rank; the others raise `OtherProcessFailed`. ``together``: error types that all processes raise at
    the same place, and that process 0 reports."""
    group = group_of_environment()
    if group.size == 1:
        yield group
        return
    # Optimizers import this module, and its default arguments keep the process group that is there at that moment. It
    # would outlive `destroy_process_group`, and its threads abort a process that exits while one of them is busy.
    importlib.import_module("torch.distributed.nn.functional")
    timeout = timedelta(seconds=timeout_s)
    with _lost(group):
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        dist.init_process_group(backend, store=store, rank=group.rank, world_size=group.size, timeout=timeout)
    try:
        yield replace(group, store=store)
    except OtherProcessFailed:
        raise
    except together as error:
        if group.is_first:
            raise
        raise OtherProcessFailed(str(error)) from error
    except Exception as error:
        if not _should_report(store, error):
            raise OtherProcessFailed(f"process {group.rank} of {group.size}: another process failed") from error
        if isinstance(error, ProcessLost):
            raise
        process_name = f"process {group.rank} of {group.size}"
        if isinstance(error, Blip2Error):
            raise type(error)(f"{process_name}: {error}") from error
        raise Blip2Error(f"{process_name}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    finally:
        dist.destroy_process_group()


@contextmanager
def _lost(group: Group) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        is_silent = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        what = "got no answer from the others" if is_silent else "lost the others: one of them has ended"
        lost = f"process {group.rank} of {group.size} {what}; start the same recipe again to resume"
        raise ProcessLost(lost) from error


def _should_report(store: Any, error: Exception) -> bool:
    """Whether no other process has reported an error yet. If a process was killed, our own launcher reports it."""
    if isinstance(error, ProcessLost) and "has ended" in str(error) and LAUNCHED in os.environ:
        return False
    try:
        return store.add("reported", 1) == 1
    except RuntimeError:  # the store belonged to process 0, which has ended
        return LAUNCHED not in os.environ
