"""Records decoding steps on a GPU once, and replays them.

A step launches about a thousand small GPU operations. For a few dozen rows, launching takes several times as long as
computing, and longer if other threads need Python's lock. A CUDA graph launches all of them at once. It always reads
and writes the same memory, so the rows move into that memory first (`KVCache.settle`).

R rows, V vocabulary.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blip2.language import LanguageModel, Resident
from blip2.layers import autocast_dtype, is_attention_recorded

MOST_ROWS = 128
"""Above this the computation takes longer than the launches."""
MOST_RECORDS = 16
MIN_REPEATS = 3
"""Number of steps of the same sizes before one is recorded, since recording takes as long as two steps."""
SWITCH = "BLIP2_CUDA_GRAPHS"
"""Environment variable; 0 switches recording off."""

Step = Callable[[], Tensor]
logger = logging.getLogger("blip2")


class Replay:
    """The recorded steps of a language model, for any number of batches and threads; while one uses it, others run
    unrecorded steps."""

    def __init__(self, language: LanguageModel, record: Callable[[Step], Step] | None = None) -> None:
        """``record``: turns a step into a replay; by default a CUDA graph."""
        self._language = weakref.ref(language)
        self._record = record or cuda_graph_on(language)
        self._is_for_cuda = record is None
        self._lock = threading.Lock()
        self._asked: Counter[tuple[int, ...]] = Counter()
        self._records: dict[tuple[int, ...], Record] = {}
        self._weights: tuple[int, ...] = ()

    def step(self, tokens_R: Tensor, state: Resident) -> Tensor:
        """As `LanguageModel.step`."""
        language = self._language()
        assert language is not None
        if not self._can_record(tokens_R) or not self._lock.acquire(blocking=False):
            return language.step(tokens_R, state)
        try:
            record = self._record_for(language, state)
            return language.step(tokens_R, state) if record is None else record.step(language, tokens_R, state)
        finally:
            self._lock.release()

    def _can_record(self, tokens_R: Tensor) -> bool:
        is_here = (tokens_R.is_cuda or not self._is_for_cuda) and len(tokens_R) <= MOST_ROWS
        plainly = autocast_dtype(tokens_R.device) is None and not is_attention_recorded()
        return is_here and plainly and torch.is_inference_mode_enabled() and os.environ.get(SWITCH) != "0"

    def _record_for(self, language: LanguageModel, state: Resident) -> Record | None:
        """The record that the state may settle into, if there is one."""
        sizes = state.fixed_sizes
        record = self._records.get(sizes)
        if record is not None and record.state_ref() is state:
            return record
        weights = weights_of(language)
        if weights != self._weights:  # they moved or were replaced, so records refer to old memory
            self._records.clear()
            self._weights = weights
            record = None
        if not weights:
            return None
        if record is None:
            self._asked[sizes] += 1
            if self._asked[sizes] <= MIN_REPEATS or not self._has_space_for(state):
                return None
            self._drop_unused()
            record = self._records[sizes] = Record(state, self._record)
        return record if record.state_ref() is None else None

    def _has_space_for(self, state: Resident) -> bool:
        """Fixed states are reserved memory: at most a tenth of what is free."""
        if not self._is_for_cuda:
            return True
        return 10 * state.num_bytes <= torch.cuda.mem_get_info(state.device)[0]

    def _drop_unused(self) -> None:
        for sizes in [sizes for sizes, record in self._records.items() if record.state_ref() is None]:
            if len(self._records) < MOST_RECORDS:
                break
            del self._records[sizes]


class Record:
    """A recorded step for states of equal `fixed_sizes`. ``state_ref``: weak reference to the state that is settled in
    its memory."""

    def __init__(self, state: Resident, record: Callable[[Step], Step]) -> None:
        self.state_ref: Callable[[], Resident | None] = lambda: None
        self._home = state.fixed()
        self._tokens_R = torch.zeros(state.fixed_sizes[0], dtype=torch.long, device=self._home.device)
        self._record = record
        self._replay: Step | None = None

    def step(self, language: LanguageModel, tokens_R: Tensor, state: Resident) -> Tensor:
        """The logits of each row's next token, ``float[R, V]``."""
        if not state.is_view_of(self._home):
            state.settle(self._home)
            self.state_ref = weakref.ref(state)
        self._tokens_R[: len(tokens_R)] = tokens_R

        def step() -> Tensor:
            return language.step(self._tokens_R, self._home)

        if self._replay is None:
            logits_RV = step()  # allocations of the first call, as in libraries, cannot be recorded
            try:
                self._replay = self._record(step)
            except RuntimeError as error:  # the result is there already; continue without recording
                logger.warning("steps cannot be recorded (%s); decoding is slower", str(error).split("\n")[0])
                self._replay = step
        else:
            logits_RV = self._replay()
        state.count_step()
        return logits_RV[: len(tokens_R)].clone()


def cuda_graph_on(language: Any) -> Callable[[Step], Step]:
    """`cuda_graph` on the language model's GPU, which may differ from torch's current device."""
    whose = weakref.ref(language)

    def record(step: Step) -> Step:
        model = whose()
        assert model is not None
        with torch.cuda.device(next(model.parameters()).device):
            return cuda_graph(step)

    return record


def cuda_graph(step: Step) -> Step:
    """Record a step's GPU operations; the result repeats them and returns the tensor that the step returned."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    was_enabled = gc.isenabled()
    gc.disable()  # a tensor freed by the collector would abort the recording
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                logits = step()
            finally:
                graph.capture_end()
    finally:
        if was_enabled:
            gc.enable()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def weights_of(language: LanguageModel) -> tuple[int, ...]:
    """Addresses of all weights; empty if they are on several devices, or if hooks cannot be recorded."""
    assert isinstance(language, nn.Module)
    tensors = [*language.parameters(), *language.buffers()]
    if len({tensor.device for tensor in tensors}) != 1 or any(map(_has_hooks, language.modules())):
        return ()
    return tuple(tensor.data_ptr() for tensor in tensors)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


_replays: weakref.WeakKeyDictionary[Any, Replay] = weakref.WeakKeyDictionary()


def replay_of(language: LanguageModel) -> Replay:
    """The replay that all batches of a language model share."""
    return _replays.setdefault(language, Replay(language))
