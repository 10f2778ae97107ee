"""One decoding step of one cache as a CUDA graph: warmed up, captured, replayed."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]


class Turns:
    """What the graphs of a device share: their memory, a stream for capture, and that one runs.

    Graphs in one memory pool overwrite each other's intermediate results, and packed kernels have
    flags for a stream, so steps of different threads follow one another on the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._lock = threading.RLock()
        self._done = torch.cuda.Event()
        self._last: torch.cuda.Stream | None = None
        with self.aside(torch.cuda.current_stream(device)):
            self._open()

    def _open(self) -> None:
        """Begin with memory of its own."""
        self.pool = torch.cuda.graph_pool_handle()
        self._keeper = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is empty: it keeps the pool between others
            self._keeper.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            self._keeper.capture_end()

    def record(self, graph: torch.cuda.CUDAGraph, work: Callable[[], Any]) -> Any:
        """What `work` gives while it is captured; RuntimeError leaves torch able to capture."""
        # Not `torch.cuda.graph`, which gives torch's free memory back at every capture.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            try:
                return work()
            finally:
                graph.capture_end()
        except RuntimeError:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """End what a capture that failed leaves: torch ends it only when CUDA has no complaint.

        The pool would count as captured into, and torch's random numbers as captured; the capture
        of nothing in a new pool, which succeeds, ends the second. Graphs there are keep theirs.
        """
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        with suppress(RuntimeError):  # when torch had ended it
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        with suppress(RuntimeError):
            self._open()

    @contextmanager
    def turn(self) -> Iterator[torch.cuda.Stream]:
        """Work on the current stream, which it gives, behind all earlier turns."""
        with self._lock:
            current = torch.cuda.current_stream(self.device)
            if self._last is not None and self._last != current:
                current.wait_event(self._done)
            try:
                yield current
            finally:
                self._done.record(current)
                self._last = current

    @contextmanager
    def aside(self, current: torch.cuda.Stream) -> Iterator[None]:
        """Work on the stream for capture, between what `current` does before and after."""
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)


_turns: dict[torch.device, Turns] = {}
_turns_lock = threading.Lock()


def turns_of(device: torch.device) -> Turns:
    """The one of `device`."""
    with _turns_lock:
        if device not in _turns:
            _turns[device] = Turns(device)
        return _turns[device]


class StepGraph:
    """A model's step for arguments of one form, on inputs of its own: `call(**arguments)`.

    The first run is the warm-up, the second is captured and replayed; every run is a step, done
    once. The cache, which a step changes in place, is given at every run and not kept: a graph
    must not keep it alive.
    """

    def __init__(self, turns: Turns, call: Callable[..., Any], arguments: Arguments) -> None:
        self._turns, self._call = turns, call
        self._inputs, self._arguments = own_inputs(arguments)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._kind: Callable[..., Any] | None = None
        self._logits: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Whether there is something to replay."""
        return self._graph is not None

    def warm_up(self, tensors: list[Tensor], cache: Any) -> Any:
        """A step run as it will be captured, and all of its output."""
        with self._turns.turn() as current:
            self._fill(tensors)
            with self._turns.aside(current):
                output = self._call(**self._arguments, past_key_values=cache)
            for name, value in output.items():
                if isinstance(value, Tensor):  # of the other stream's memory
                    output[name] = value.clone()
            return output

    def capture(self, cache: Any) -> None:
        """Record the step without running it; RuntimeError when that cannot be done."""
        graph = torch.cuda.CUDAGraph()
        turns = self._turns
        with turns.turn() as current, turns.aside(current), without_collection():
            output = turns.record(
                graph, lambda: self._call(**self._arguments, past_key_values=cache)
            )
        self._graph, self._kind, self._logits = graph, type(output), output.logits

    def replay(self, tensors: Sequence[Tensor], cache: Any) -> Any:
        """A step on these inputs, of which the last may be left out: they are as they were.

        The logits are a copy, as the next replay overwrites them.
        """
        assert self._graph is not None
        assert self._kind is not None
        assert self._logits is not None
        with self._turns.turn():
            self._fill(tensors)
            self._graph.replay()
            return self._kind(logits=self._logits.clone(), past_key_values=cache)

    def _fill(self, tensors: Sequence[Tensor]) -> None:
        for own, given in zip(self._inputs, tensors, strict=False):
            own.copy_(given)


@contextmanager
def without_collection() -> Iterator[None]:
    """Keep Python's garbage collector from destroying other graphs meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def own_inputs(arguments: Arguments) -> tuple[list[Tensor], Arguments]:
    """New tensors of the form of those in `arguments`, in order, and the arguments with them."""
    found: list[Tensor] = []

    def own(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: own(part) for name, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        # Contiguous: a mask may be one row for all sequences, which could not be filled.
        new = torch.empty_like(value, memory_format=torch.contiguous_format)
        found.append(new)
        return new

    return found, own(arguments)
