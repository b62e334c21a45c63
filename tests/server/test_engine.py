"""How the machine is shared: cores among copies of the network, memory among batches."""

import asyncio
import os
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from server.config import ServerConfig
from server.cores import Share, share_cores, usable_cores, wake_without_preempting
from server.engine import Budget, Engine, EngineSpec
from server.statistics import Times
from server.tensors import from_raw
from tests.server.gate import GatedRuntime, wait_for


@pytest.mark.parametrize(
    ("instances", "threads", "cores", "share"),
    [
        (None, None, 8, Share(8, 1)),
        (None, 4, 8, Share(2, 4)),
        (None, 16, 8, Share(1, 16)),
        (1, None, 8, Share(1, 8)),
        (3, None, 8, Share(3, 2)),
        (9, None, 8, Share(9, 1)),
        (5, 2, 8, Share(5, 2)),
    ],
)
def test_cores_are_shared_one_thread_a_copy_unless_told_otherwise(instances, threads, cores, share):
    assert share_cores(instances, threads, cores) == share


def test_spinning_is_off_unless_asked_for(tmp_path):
    assert not ServerConfig(models=tmp_path).spinning


@pytest.mark.parametrize(("text", "cores"), [("50000 100000", 1), ("max 100000", None), ("", None), (None, None)])
def test_a_container_counts_only_the_cores_that_its_quota_pays_for(tmp_path, text, cores):
    quota = tmp_path / "cpu.max"
    if text is not None:
        quota.write_text(text)
    assert usable_cores(quota) == (cores or usable_cores(tmp_path / "missing"))


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a policy of Linux")
def test_a_servers_threads_do_not_preempt_each_other():
    policies = []

    def look():  # the policy is that of a thread, and of the threads that it makes
        wake_without_preempting()
        later = threading.Thread(target=lambda: policies.append(os.sched_getscheduler(0)))
        later.start()
        later.join()

    server = threading.Thread(target=look)
    server.start()
    server.join()
    assert policies == [os.SCHED_BATCH]


def test_batches_wait_for_memory_in_turn_and_the_largest_waits_for_all_of_it():
    budget, order, doors = Budget(10), [], {size: threading.Event() for size in (6, 5, 99, 1)}

    def take(size):
        with budget.hold(size):
            order.append(size)
            assert doors[size].wait(60)

    threads = [threading.Thread(target=take, args=(size,)) for size in doors]
    for n, thread in enumerate(threads):
        thread.start()
        wait_for(lambda n=n: len(order) + len(budget._turns) == n + 1)
    assert order == [6]  # 5 does not fit beside 6; 1 would, and does not overtake
    doors[6].set()
    wait_for(lambda: order == [6, 5])
    doors[5].set()
    wait_for(lambda: order == [6, 5, 99])
    for door in doors.values():
        door.set()
    for thread in threads:
        thread.join()
    assert order == [6, 5, 99, 1]


@pytest.mark.parametrize("start", range(4))
def test_the_network_gets_aligned_numbers_from_whatever_byte_of_a_message_they_begin_at(start):
    class Looking(GatedRuntime):
        def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
            assert pixels_NCHW.flags.aligned
            return super().run(pixels_NCHW, outputs)

    sent = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)
    pixels = from_raw("pixels", "FP32", sent.shape, memoryview(bytes(start) + sent.tobytes())[start:]).array

    async def answer() -> np.ndarray:
        engine = Engine([Looking()], EngineSpec())
        try:
            return (await engine.run(pixels, ["embedding"], Times()))["embedding"]
        finally:
            await engine.close()

    np.testing.assert_array_equal(asyncio.run(answer()), sent.mean(axis=(2, 3)))
