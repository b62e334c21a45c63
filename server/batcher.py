"""Rows of many requests in, batches out, and every answer back to the request that it belongs to.

The batcher knows rows, deadlines and instances; it knows no model, no image and no wire. Whatever may share a batch has
the same key. Read in this order: BatchSpec, Answer, _Entry, Batcher.
Axes: R rows of one request, B rows of one batch; both come first in every array.
"""

import asyncio
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from server.errors import Draining, EngineFailed, Expired

Run = Callable[[Hashable, list[np.ndarray]], Mapping[str, np.ndarray]]
"""(key, the rows [R, ...] of each request in the batch) -> named arrays [B, ...]; called in the thread of its instance, never twice at
once. Whether the rows are put side by side is the network's affair: one that moves them elsewhere need not."""

MAX_INT = 1 << 62
PATIENCE_S = 30.0
"""A request without a deadline is queued as if it had this one, so that urgent ones pass it but cannot starve it."""

TURNS = 3
"""Turns of the event loop from a row's arrival to its batch: microseconds, unless the loop is busy with further arrivals."""


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """How rows are put together."""

    max_rows: int = 8
    """Largest batch. A larger request is split; its rows come back in order."""
    max_delay_us: int = 0
    """How long an idle instance waits for a fuller batch. 0 is right on a CPU, where batches gain little; 1000 to
    2000 on a GPU."""


@dataclass(eq=False, slots=True)
class Execution:
    """One run of the network; every request that took part in it holds the same object."""

    batch_rows: int
    run_ns: int
    _counted: set[str] = field(default_factory=set, repr=False)

    def first_count(self, who: str) -> bool:
        """True for the first call by `who`, so that a run which many requests share is counted once."""
        new = who not in self._counted
        self._counted.add(who)
        return new


@dataclass(slots=True)
class Answer:
    """What came back for one request: arrays [R, ...], how long its first row waited, and its runs."""

    outputs: dict[str, np.ndarray]
    queue_ns: int
    executions: tuple[Execution, ...]


@dataclass(eq=False, slots=True)
class _Entry:
    rows: np.ndarray
    due_s: float
    deadline_s: float | None
    arrived_s: float
    order: int
    future: asyncio.Future[Answer]
    begun: Callable[[], None] | None
    taken: int = 0
    answered: int = 0
    started_ns: int | None = None
    arrived_ns: int = field(default_factory=time.perf_counter_ns)
    parts: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    executions: list[Execution] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.rows) - self.taken


@dataclass(eq=False, slots=True)
class _Piece:
    """Rows [start, stop) of an entry, on their way through one batch."""

    entry: _Entry
    start: int
    stop: int


@dataclass(eq=False, slots=True)
class _Batch:
    """Work for an instance; what came of it is told to `done`, on the loop."""

    key: Hashable
    pieces: list[_Piece]
    loop: asyncio.AbstractEventLoop
    done: "Callable[[_Instance, _Batch, _Outcome], None]"


_Outcome = tuple[dict[str, np.ndarray], int] | BaseException
"""What a batch gave and how long it ran, or why it gave nothing."""


class _Instance:
    """A network in a thread of its own.

    An executor's futures would do, and cost more than the rest of the batcher: each batch passes two of them, a lock each, and a task.
    """

    def __init__(self, run: Run, name: str) -> None:
        self._run = run
        self._work: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    def begin(self, batch: _Batch) -> None:
        """Compute it when what was begun before is done."""
        self._work.put(batch)

    def end(self) -> None:
        """Wait until everything that was begun is done; nothing may follow."""
        self._work.put(None)
        self._thread.join()

    def _live(self) -> None:
        while (batch := self._work.get()) is not None:
            outcome: _Outcome
            try:
                outcome = _run_pieces(self._run, batch.key, batch.pieces)
            except BaseException as error:
                outcome = error
            batch.loop.call_soon_threadsafe(batch.done, self, batch, outcome)
            del batch, outcome  # an idle instance holds nobody's images


class Batcher:
    """Feeds one or more instances of the same network. Lives on one event loop; use it from there only."""

    def __init__(
        self, runs: Sequence[Run], spec: BatchSpec, most_rows: Callable[[Hashable], int] = lambda _: MAX_INT
    ) -> None:
        """`most_rows` says how many rows of a key an instance has memory for; the spec's bound holds beside it."""
        self.spec = spec
        self._most_rows = most_rows
        self.executions = 0
        self.expired_rows = 0
        self.cancelled_rows = 0
        self._instances = [_Instance(run, f"run-{i}") for i, run in enumerate(runs)]
        self._idle = self._instances.copy()
        self._at_rest = asyncio.Event()
        self._at_rest.set()
        self._buckets: dict[Hashable, list[_Entry]] = {}
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._soon = False
        self._closed = False

    @property
    def waiting_rows(self) -> int:
        """Rows that no instance has begun yet."""
        return sum(entry.left for bucket in self._buckets.values() for entry in bucket)

    async def submit(
        self,
        key: Hashable,
        rows: np.ndarray,
        deadline_s: float | None = None,
        patience_s: float = PATIENCE_S,
        begun: Callable[[], None] | None = None,
    ) -> Answer:
        """Queue rows [R, ...] under `key` and wait for their answer; `begun` is called when an instance begins with the first of them.

        `deadline_s` is in the loop's own time; rows without one let those pass that are due within `patience_s`. Raises Expired when
        the deadline passes before the last row is taken, EngineFailed when a batch with rows of this request fails, Draining after
        `close`. Cancelling the caller drops what is not yet running.
        """
        if self._closed:
            raise Draining("the server is shutting down")
        if not len(rows):
            raise ValueError("a request needs at least one row")
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = min(deadline_s if deadline_s is not None else math.inf, now + patience_s)
        entry = _Entry(rows, due, deadline_s, now, next(self._order), loop.create_future(), begun)
        self._buckets.setdefault(key, []).append(entry)
        self._dispatch_soon(loop)
        try:
            return await entry.future
        finally:
            self._forget(key, entry)

    async def close(self) -> None:
        """Finish what is running, fail what is waiting, end the threads."""
        self._closed = True
        for bucket in self._buckets.values():
            for entry in bucket:
                _fail(entry, Draining("the server shut down before this request was run"))
        self._buckets.clear()
        await self._at_rest.wait()
        for instance in self._instances:
            instance.end()

    def _forget(self, key: Hashable, entry: _Entry) -> None:
        """Take the entry of a caller who is gone (answered, expired or cancelled) out of its bucket at once."""
        bucket = self._buckets.get(key, [])
        if entry in bucket:
            self._count_dropped(entry)
            bucket.remove(entry)
            if not bucket:
                del self._buckets[key]

    def _count_dropped(self, entry: _Entry) -> None:
        """Rows of one whose batch failed were not dropped for the caller's sake, even if its deadline has passed since."""
        future = entry.future
        if future.cancelled() and not self._is_late(entry):
            self.cancelled_rows += entry.left
        elif future.cancelled() or (future.done() and isinstance(future.exception(), Expired)):
            self.expired_rows += entry.left

    def _is_late(self, entry: _Entry) -> bool:
        return entry.deadline_s is not None and asyncio.get_running_loop().time() >= entry.deadline_s

    def _dispatch_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Dispatch once everything that these turns of the loop bring is queued: those requests share a batch."""
        if not self._soon:
            self._soon = True
            loop.call_soon(self._turn, loop, TURNS)

    def _turn(self, loop: asyncio.AbstractEventLoop, left: int) -> None:
        if left > 1:
            loop.call_soon(self._turn, loop, left - 1)
        else:
            self._dispatch()

    def _dispatch(self) -> None:
        """Give idle instances the most urgent ripe batches, and wake up again when the next one ripens."""
        self._soon = False
        if self._timer:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self._idle and self._buckets:
            self._drop_late(loop.time())
            ripe = self._ripe(loop.time())
            if not ripe:
                break
            key = ripe[0] if len(ripe) == 1 else min(ripe, key=self._most_urgent)
            instance = self._idle.pop()
            self._at_rest.clear()
            instance.begin(_Batch(key, self._take(key), loop, self._finish))
        if self._idle and self._buckets:
            self._timer = loop.call_at(min(map(self._ripe_at, self._buckets)), self._dispatch)

    def _most_urgent(self, key: Hashable) -> tuple[float, int]:
        return min((entry.due_s, entry.order) for entry in self._buckets[key])

    def _room(self, key: Hashable) -> int:
        return min(self.spec.max_rows, self._most_rows(key))

    def _ripe(self, now_s: float) -> list[Hashable]:
        """Keys of which a batch may begin."""
        if not self.spec.max_delay_us:
            return list(self._buckets)
        return [key for key in self._buckets if self._ripe_at(key) <= now_s]

    def _ripe_at(self, key: Hashable) -> float:
        if not self.spec.max_delay_us:
            return -math.inf
        bucket = self._buckets[key]
        if sum(entry.left for entry in bucket) >= self._room(key):
            return -math.inf
        return min(entry.arrived_s for entry in bucket) + self.spec.max_delay_us / 1e6

    def _drop_late(self, now_s: float) -> None:
        gone = [
            (key, entry)
            for key, bucket in self._buckets.items()
            for entry in bucket
            if entry.future.done() or (entry.deadline_s is not None and now_s >= entry.deadline_s)
        ]
        for key, entry in gone:
            _fail(entry, Expired("the deadline passed before the request was run"))
            self._forget(key, entry)

    def _take(self, key: Hashable) -> list[_Piece]:
        """Rows for one batch, the earliest deadline first, rows of one request in order."""
        bucket = self._buckets[key]
        if len(bucket) > 1:
            bucket = sorted(bucket, key=lambda entry: (entry.due_s, entry.order))
        pieces: list[_Piece] = []
        room = self._room(key)
        if not self.spec.max_delay_us:  # fuller batches gain little: better that nobody idles
            room = min(room, -(-self.waiting_rows // (1 + len(self._idle))))
        for entry in bucket:
            stop = min(len(entry.rows), entry.taken + room)
            if stop > entry.taken:
                pieces.append(_Piece(entry, entry.taken, stop))
                room -= stop - entry.taken
                entry.taken = stop
                if entry.started_ns is None:
                    entry.started_ns = time.perf_counter_ns()
                    if entry.begun is not None:
                        entry.begun()
        left = [entry for entry in bucket if entry.left]
        if left:
            self._buckets[key] = left
        else:
            del self._buckets[key]
        return pieces

    def _finish(self, instance: _Instance, batch: _Batch, outcome: _Outcome) -> None:
        """Tell the waiters of a batch. Its failure reaches each of them, and the instance goes on."""
        self._idle.append(instance)
        if len(self._idle) == len(self._instances):
            self._at_rest.set()
        if isinstance(outcome, BaseException):
            for piece in batch.pieces:  # before the next batch is begun, which would hold what is left of these
                _fail(piece.entry, EngineFailed("the batch failed"), cause=outcome)
        if self._buckets and not self._soon:
            self._dispatch()
        if not isinstance(outcome, BaseException):
            self.executions += 1
            _hand_out(batch.pieces, *outcome)
        elif not isinstance(outcome, Exception):
            raise outcome


def _run_pieces(run: Run, key: Hashable, pieces: list[_Piece]) -> tuple[dict[str, np.ndarray], int]:
    """Run the pieces' rows, check that each output has a row for each row. In the instance's thread."""
    parts = [piece.entry.rows[piece.start : piece.stop] for piece in pieces]
    count = sum(map(len, parts))
    began = time.perf_counter_ns()
    outputs = dict(run(key, parts))
    run_ns = time.perf_counter_ns() - began
    if any(len(array) != count for array in outputs.values()):
        shapes = {name: array.shape for name, array in outputs.items()}
        raise ValueError(f"{count} rows went in, and the outputs have the shapes {shapes}")
    return outputs, run_ns


def _hand_out(pieces: list[_Piece], outputs: dict[str, np.ndarray], run_ns: int) -> None:
    """Cut the batch's outputs [B, ...] back into pieces; answer each request whose last piece this was."""
    execution = Execution(sum([piece.stop - piece.start for piece in pieces]), run_ns)
    offset = 0
    for piece in pieces:
        size, entry = piece.stop - piece.start, piece.entry
        stop = offset + size
        part = outputs if len(pieces) == 1 else {name: array[offset:stop] for name, array in outputs.items()}
        entry.parts[piece.start] = part
        entry.executions.append(execution)
        offset = stop
        entry.answered += size
        if entry.answered == len(entry.rows) and not entry.future.done():
            entry.future.set_result(_join(entry))


def _join(entry: _Entry) -> Answer:
    if len(entry.parts) == 1:
        (joined,) = entry.parts.values()
    else:
        parts = [entry.parts[start] for start in sorted(entry.parts)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Answer(joined, (entry.started_ns or entry.arrived_ns) - entry.arrived_ns, tuple(entry.executions))


def _fail(entry: _Entry, error: Exception, cause: BaseException | None = None) -> None:
    if not entry.future.done():
        error.__cause__ = cause
        entry.future.set_exception(error)
