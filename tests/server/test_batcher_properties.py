"""What holds for the batcher whatever arrives, leaves, comes too late or breaks, in any order.

Hypothesis writes the story: requests of several kinds and sizes, callers who leave, time that jumps, runs of the network that end well or
badly. The network is held by the test, and remembers which rows it was given, so that each answer can be held against the unbatched one and
each row accounted for.
"""

import asyncio
import queue
import threading
from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.batcher import Batcher, BatchSpec
from server.errors import EngineFailed, Expired

SUBMIT = st.tuples(st.just("submit"), st.sampled_from([2.0, 3.0]), st.integers(1, 9), st.sampled_from([None, 5, 50]))
CANCEL = st.tuples(st.just("cancel"), st.integers(0, 30))
RUN = st.tuples(st.just("run"), st.sampled_from([True, True, True, False]))
WAIT = st.tuples(st.just("wait"), st.sampled_from([1, 10, 100]))
STORIES = st.lists(st.one_of(SUBMIT, SUBMIT, CANCEL, RUN, RUN, WAIT), max_size=25)


class ShiftedLoop(asyncio.SelectorEventLoop):
    """A loop whose clock the story moves."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


@dataclass
class Network:
    """Runs wait for a verdict; after `open`, all end well."""

    verdicts: queue.Queue = field(default_factory=queue.Queue)
    opened: threading.Event = field(default_factory=threading.Event)
    batches: list[tuple[float, list[int], bool]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, key: float, parts: list[np.ndarray]) -> dict[str, np.ndarray]:
        rows, good = np.concatenate(parts), True
        while not self.opened.is_set():
            try:
                good = self.verdicts.get(timeout=0.005)
                break
            except queue.Empty:
                continue
        with self.lock:
            self.batches.append((key, rows[:, 0].astype(int).tolist(), good))
        if not good:
            raise RuntimeError("a run that ends badly")
        return unbatched(key, rows)


def unbatched(key: float, rows: np.ndarray) -> dict[str, np.ndarray]:
    return {"scaled": rows * key, "sum": rows.sum(axis=1)}


@dataclass
class Request:
    key: float
    rows: np.ndarray
    task: asyncio.Task

    @property
    def ids(self) -> set[int]:
        return set(self.rows[:, 0].astype(int).tolist())


async def live(story: list, max_rows: int, instances: int) -> tuple[list[Request], Network, Batcher]:
    loop = asyncio.get_running_loop()
    network, requests, next_id = Network(), [], 0
    batcher = Batcher([network] * instances, BatchSpec(max_rows=max_rows))
    for action, *words in story:
        if action == "submit":
            key, n, limit_ms = words
            rows = np.arange(next_id, next_id + n, dtype=np.float32)[:, None] + np.zeros(2, np.float32)
            next_id += n
            deadline_s = None if limit_ms is None else loop.time() + limit_ms / 1000
            requests.append(Request(key, rows, loop.create_task(batcher.submit(key, rows, deadline_s))))
        elif action == "cancel" and requests:
            requests[words[0] % len(requests)].task.cancel()
        elif action == "run":
            network.verdicts.put(words[0])
            await asyncio.sleep(0.001)
        elif action == "wait":
            loop.ahead_s += words[0] / 1000
        await asyncio.sleep(0)
    network.opened.set()
    if requests:
        await asyncio.wait([request.task for request in requests], timeout=30)
    await batcher.close()
    return requests, network, batcher


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(story=STORIES, max_rows=st.integers(1, 6), instances=st.integers(1, 2))
def test_every_reply_is_the_unbatched_one_and_every_row_is_accounted_for(story, max_rows, instances):
    with asyncio.Runner(loop_factory=ShiftedLoop) as runner:
        requests, network, batcher = runner.run(live(story, max_rows, instances))
    computed = [row for _, rows, _ in network.batches for row in rows]
    assert len(computed) == len(set(computed)), "no row is computed twice"
    assert all(len(rows) <= max_rows for _, rows, _ in network.batches)
    broken = {row for _, rows, good in network.batches if not good for row in rows}
    left = 0
    for request in requests:
        assert request.task.done(), "nobody waits for ever"
        of_its_key = {row for key, rows, _ in network.batches if key == request.key for row in rows}
        assert request.ids & set(computed) <= of_its_key, "kinds do not mix"
        if request.task.cancelled() or isinstance(request.task.exception(), Expired):
            left += len(request.ids - set(computed))
        elif request.ids & broken:
            assert isinstance(request.task.exception(), EngineFailed), "a failing batch fails all of its waiters"
        else:
            answer = request.task.result()
            for name, wanted in unbatched(request.key, request.rows).items():
                np.testing.assert_array_equal(answer.outputs[name], wanted)
            assert request.ids <= set(computed)
            assert sum(run.batch_rows for run in answer.executions) >= len(request.rows)
    assert batcher.cancelled_rows + batcher.expired_rows == left, "what was dropped before compute is counted"
    assert batcher.waiting_rows == 0
