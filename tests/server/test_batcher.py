"""The batcher alone, with functions in place of networks: answers, order, deadlines, departures, failures."""

import asyncio
import random
import threading
import time

import numpy as np
import pytest

from server import batcher
from server.batcher import Batcher, BatchSpec
from server.errors import Draining, EngineFailed, Expired


def double(key, parts):
    rows = np.concatenate(parts)
    return {"twice": 2 * rows, "sum": rows.reshape(len(rows), -1).sum(axis=1)}


class Gate:
    """An instance that runs nothing until it is opened, and remembers what it was given."""

    def __init__(self, run=double):
        self.open = threading.Event()
        self.entered = threading.Event()
        self.batches = []
        self._run = run

    def __call__(self, key, parts):
        self.entered.set()
        self.open.wait(10)
        self.batches.append((key, np.concatenate(parts)))
        return self._run(key, parts)

    async def until_entered(self):
        await asyncio.to_thread(self.entered.wait, 10)


def rows(*values):
    return np.array(values, np.float32)[:, None]


async def start(batcher, *args):
    """Submit in the background, and let it reach the queue."""
    task = asyncio.ensure_future(batcher.submit(*args))
    await asyncio.sleep(0)
    return task


def test_one_request_gets_its_own_rows_back():
    async def scenario():
        batcher = Batcher([double], BatchSpec())
        answer = await batcher.submit("key", rows(1, 2, 3))
        await batcher.close()
        return answer

    answer = asyncio.run(scenario())
    assert answer.outputs["twice"].tolist() == [[2], [4], [6]]
    assert [one.batch_rows for one in answer.executions] == [3]


def test_requests_that_wait_for_a_busy_instance_share_the_next_batch():
    async def scenario():
        gate = Gate()
        batcher = Batcher([gate], BatchSpec(max_rows=4))
        first = await start(batcher, "key", rows(0))
        await gate.until_entered()
        others = [await start(batcher, "key", rows(n)) for n in (1, 2, 3)]
        gate.open.set()
        answers = await asyncio.gather(first, *others)
        await batcher.close()
        return gate.batches, answers

    batches, answers = asyncio.run(scenario())
    assert [len(batch) for _, batch in batches] == [1, 3]
    assert [answer.outputs["twice"].item() for answer in answers] == [0, 2, 4, 6]


def test_rows_of_different_keys_never_share_a_batch():
    async def scenario():
        gate = Gate()
        batcher = Batcher([gate], BatchSpec(max_rows=8))
        tasks = [await start(batcher, "ab"[n % 2], rows(n)) for n in range(6)]
        gate.open.set()
        await asyncio.gather(*tasks)
        await batcher.close()
        return gate.batches

    for key, batch in asyncio.run(scenario()):
        assert {int(value) % 2 for value in batch[:, 0]} == {"ab".index(key)}


def test_a_request_larger_than_a_batch_is_split_and_comes_back_in_order():
    async def scenario():
        gate = Gate()
        gate.open.set()
        batcher = Batcher([gate], BatchSpec(max_rows=4))
        answer = await batcher.submit("key", rows(*range(11)))
        await batcher.close()
        return gate.batches, answer

    batches, answer = asyncio.run(scenario())
    assert [len(batch) for _, batch in batches] == [4, 4, 3]
    assert answer.outputs["twice"][:, 0].tolist() == [2 * n for n in range(11)]


def test_a_batch_holds_no_more_rows_than_an_instance_has_memory_for():
    async def scenario():
        batcher = Batcher([double], BatchSpec(max_rows=8), lambda key: {"large": 2, "small": 100}[key])
        answers = [await batcher.submit(key, rows(1, 2, 3, 4, 5)) for key in ("large", "small")]
        await batcher.close()
        return answers

    large, small = asyncio.run(scenario())
    assert [one.batch_rows for one in large.executions] == [2, 2, 1]
    assert [one.batch_rows for one in small.executions] == [5]
    assert large.outputs["twice"].tolist() == small.outputs["twice"].tolist()


def test_instances_that_idle_share_the_rows_that_wait():
    async def scenario():
        gates = Gate(), Gate()
        batcher = Batcher(gates, BatchSpec(max_rows=8))
        task = await start(batcher, "key", rows(1, 2, 3, 4, 5))
        for gate in gates:
            await gate.until_entered()
            gate.open.set()
        answer = await task
        await batcher.close()
        return answer

    answer = asyncio.run(scenario())
    assert answer.outputs["twice"].ravel().tolist() == [2, 4, 6, 8, 10]
    assert sorted(one.batch_rows for one in answer.executions) == [2, 3]


def test_one_row_is_one_batch_however_many_instances_idle(monkeypatch):
    begun, run_pieces = [], batcher._run_pieces
    monkeypatch.setattr(batcher, "_run_pieces", lambda *args: begun.append(len(args[2])) or run_pieces(*args))

    async def scenario():
        idle = Batcher([double] * 3, BatchSpec())
        for _ in range(4):
            await idle.submit("key", rows(7))
        await idle.close()

    asyncio.run(scenario())
    assert begun == [1] * 4


def test_a_delay_collects_rows_and_ends_when_the_batch_is_full():
    async def scenario():
        gate = Gate()
        gate.open.set()
        batcher = Batcher([gate], BatchSpec(max_rows=3, max_delay_us=10_000_000))
        began = time.monotonic()
        await asyncio.gather(*(batcher.submit("key", rows(n)) for n in range(3)))
        await batcher.close()
        return gate.batches, time.monotonic() - began

    batches, took_s = asyncio.run(scenario())
    assert [len(batch) for _, batch in batches] == [3]
    assert took_s < 5


def test_a_delay_ends_by_itself_when_nothing_more_comes():
    async def scenario():
        batcher = Batcher([double], BatchSpec(max_rows=8, max_delay_us=20_000))
        answer = await asyncio.wait_for(batcher.submit("key", rows(1)), 5)
        await batcher.close()
        return answer

    assert asyncio.run(scenario()).queue_ns >= 15_000_000


def test_the_most_urgent_bucket_goes_first():
    async def scenario():
        gate = Gate()
        batcher = Batcher([gate], BatchSpec())
        now = asyncio.get_running_loop().time()
        tasks = [await start(batcher, "first", rows(0))]
        await gate.until_entered()
        for key, deadline_s in (("patient", None), ("late", now + 20), ("urgent", now + 10)):
            tasks.append(await start(batcher, key, rows(0), deadline_s))
        gate.open.set()
        await asyncio.gather(*tasks)
        await batcher.close()
        return [key for key, _ in gate.batches]

    assert asyncio.run(scenario()) == ["first", "urgent", "late", "patient"]


def test_the_most_urgent_request_of_a_bucket_goes_first():
    async def scenario():
        gate = Gate()
        batcher = Batcher([gate], BatchSpec(max_rows=1))
        now = asyncio.get_running_loop().time()
        tasks = [await start(batcher, "key", rows(0))]
        await gate.until_entered()
        for value, deadline_s in ((1, None), (5, now + 60), (2, now + 20), (3, now + 10), (4, now + 20)):
            tasks.append(await start(batcher, "key", rows(value), deadline_s))
        gate.open.set()
        await asyncio.gather(*tasks)
        await batcher.close()
        return [batch.item() for _, batch in gate.batches]

    assert asyncio.run(scenario()) == [0, 3, 2, 4, 1, 5]  # one without a deadline is not passed by those of a minute


def test_nothing_is_computed_for_a_caller_who_left():
    async def scenario():
        gate = Gate()
        batcher = Batcher([gate], BatchSpec(max_rows=4))
        first = await start(batcher, "key", rows(0))
        await gate.until_entered()
        leaving, staying = await start(batcher, "key", rows(1, 1)), await start(batcher, "key", rows(2))
        leaving.cancel()
        await asyncio.sleep(0)
        waiting = batcher.waiting_rows
        gate.open.set()
        await asyncio.gather(first, staying)
        await batcher.close()
        return gate.batches, waiting, batcher.cancelled_rows

    batches, waiting, cancelled = asyncio.run(scenario())
    assert [batch[:, 0].tolist() for _, batch in batches] == [[0], [2]]
    assert (waiting, cancelled) == (1, 2)


def test_nothing_is_computed_for_a_caller_who_leaves_in_the_moment_of_asking():
    async def scenario():
        gate = Gate()
        gate.open.set()
        batcher = Batcher([gate], BatchSpec())
        leaving = await start(batcher, "key", rows(1, 1))
        leaving.cancel()
        await batcher.submit("key", rows(2))
        await batcher.close()
        return [batch[:, 0].tolist() for _, batch in gate.batches], batcher.cancelled_rows

    assert asyncio.run(scenario()) == ([[2]], 2)


def test_the_rest_of_a_split_request_is_dropped_when_its_caller_leaves():
    async def scenario():
        gate = Gate()
        batcher = Batcher([gate], BatchSpec(max_rows=2))
        leaving = await start(batcher, "key", rows(1, 1, 1, 1, 1))
        await gate.until_entered()
        leaving.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        await batcher.submit("key", rows(7))
        await batcher.close()
        return [batch[:, 0].tolist() for _, batch in gate.batches]

    assert asyncio.run(scenario()) == [[1, 1], [7]]


def test_nothing_is_computed_after_the_deadline():
    async def scenario():
        gate = Gate()
        batcher = Batcher([gate], BatchSpec())
        loop = asyncio.get_running_loop()
        first = await start(batcher, "key", rows(0))
        await gate.until_entered()
        late = await start(batcher, "key", rows(1), loop.time() + 0.02)
        await asyncio.sleep(0.05)
        gate.open.set()
        with pytest.raises(Expired, match="deadline"):
            await late
        await first
        await batcher.close()
        return len(gate.batches), batcher.expired_rows

    assert asyncio.run(scenario()) == (1, 1)


def test_a_failing_batch_fails_all_of_its_waiters_and_nothing_else():
    def fragile(key, parts):
        rows = np.concatenate(parts)
        if (rows < 0).any():
            raise RuntimeError("boom")
        return {"same": rows}

    async def scenario():
        gate = Gate(fragile)
        batcher = Batcher([gate], BatchSpec(max_rows=4))
        first = await start(batcher, "key", rows(0))
        await gate.until_entered()
        sick = [await start(batcher, "key", rows(-1)), await start(batcher, "key", rows(1))]
        well = await start(batcher, "other", rows(5))
        gate.open.set()
        results = await asyncio.gather(first, *sick, well, return_exceptions=True)
        after = await batcher.submit("key", rows(6))
        await batcher.close()
        return results, after

    (first, *sick, well), after = asyncio.run(scenario())
    assert [type(error) for error in sick] == [EngineFailed, EngineFailed]
    assert "boom" not in str(sick[0])
    assert isinstance(sick[0].__cause__, RuntimeError)
    assert [one.outputs["same"].item() for one in (first, well, after)] == [0, 5, 6]


def test_the_rest_of_a_request_is_not_computed_once_a_batch_of_it_failed():
    seen = []

    def run(key, parts):
        seen.append(np.concatenate(parts)[:, 0].tolist())
        if 1 in seen[-1]:
            raise ValueError("of these rows")
        return double(key, parts)

    async def scenario():
        batcher = Batcher([run], BatchSpec(max_rows=2))
        split, other = await start(batcher, "key", rows(0, 1, 2, 3, 4)), await start(batcher, "other", rows(9))
        with pytest.raises(EngineFailed):
            await split
        answer = await other
        await batcher.close()
        return answer

    assert asyncio.run(scenario()).outputs["twice"].item() == 18
    assert seen == [[0, 1], [9]]


def test_an_output_with_too_few_rows_is_a_failure_and_not_a_wrong_answer():
    async def scenario():
        batcher = Batcher([lambda key, parts: {"short": parts[0][1:]}], BatchSpec())
        with pytest.raises(EngineFailed):
            await batcher.submit("key", rows(1, 2))
        await batcher.close()

    asyncio.run(scenario())


def test_an_empty_request_is_refused_at_once():
    async def scenario():
        batcher = Batcher([double], BatchSpec())
        with pytest.raises(ValueError, match="at least one row"):
            await batcher.submit("key", np.zeros((0, 1), np.float32))
        await batcher.close()

    asyncio.run(scenario())


def test_closing_does_not_hold_up_the_loop_that_what_runs_may_need():
    async def scenario():
        gate = Gate()
        batcher = Batcher([gate], BatchSpec())
        running = await start(batcher, "key", rows(3))
        await gate.until_entered()
        closing = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0.05)
        assert not closing.done()  # held up, the loop comes here when the gate has given way, after 10 s
        gate.open.set()
        await closing
        return await running

    assert asyncio.run(scenario()).outputs["twice"].item() == 6


def test_closing_finishes_what_runs_and_fails_what_waits():
    async def scenario():
        gate = Gate()
        batcher = Batcher([gate], BatchSpec())
        running = await start(batcher, "key", rows(1))
        await gate.until_entered()
        waiting = await start(batcher, "key", rows(2))
        closing = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0)
        gate.open.set()
        results = await asyncio.gather(running, waiting, return_exceptions=True)
        await closing
        with pytest.raises(Draining):
            await batcher.submit("key", rows(3))
        return results

    running, waiting = asyncio.run(scenario())
    assert running.outputs["twice"].item() == 2
    assert isinstance(waiting, Draining)


@pytest.mark.parametrize("seed", range(12))
def test_every_reply_equals_the_unbatched_one_whatever_arrives_leaves_or_breaks(seed):
    dice = random.Random(seed)
    poison = 1_000_000.0

    def network(key, parts):
        rows = np.concatenate(parts)
        time.sleep(dice.choice([0, 0, 0.001]))
        if (rows == poison).any():
            raise RuntimeError("poisoned batch")
        return {"value": rows * key, "index": rows[:, :1] + key}

    async def caller(batcher, number, counts):
        key = dice.choice([1.0, 2.0, 3.0])
        poisoned = dice.random() < 0.03
        given = np.full((dice.randint(1, 9), 2), poison if poisoned else 0, np.float32)
        given += 0 if poisoned else np.arange(given.size, dtype=np.float32).reshape(given.shape) + 100 * number
        await asyncio.sleep(dice.random() * 0.05)
        deadline_s = asyncio.get_running_loop().time() + dice.random() * 0.05 if dice.random() < 0.2 else None
        task = asyncio.ensure_future(batcher.submit(key, given, deadline_s))
        if dice.random() < 0.2:
            asyncio.get_running_loop().call_later(dice.random() * 0.02, task.cancel)
        try:
            answer = await task
        except (EngineFailed, Expired, asyncio.CancelledError) as error:
            counts[type(error)] = counts.get(type(error), 0) + 1
            return
        assert not poisoned
        np.testing.assert_array_equal(answer.outputs["value"], given * key)
        np.testing.assert_array_equal(answer.outputs["index"], given[:, :1] + key)
        counts["answered"] = counts.get("answered", 0) + 1

    async def scenario():
        spec = BatchSpec(max_rows=dice.randint(1, 6), max_delay_us=dice.choice([0, 0, 2000]))
        batcher = Batcher([network] * dice.randint(1, 3), spec)
        counts = {}
        await asyncio.wait_for(asyncio.gather(*(caller(batcher, n, counts) for n in range(120))), 30)
        assert batcher.waiting_rows == 0
        await batcher.close()
        return counts

    counts = asyncio.run(scenario())
    assert sum(counts.values()) == 120
    assert counts["answered"] > 30
