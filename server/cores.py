"""What a process takes of its machine: for each core one copy of the network on one thread, unless the operator says otherwise.

Copies that each compute alone waste nothing on waiting for each other: on two cores, two one-threaded copies answer a quarter more images a
second than one copy on two threads (docs/serving-speed.md).
"""

import ctypes
import gc
import math
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Where Linux says how much CPU time a container may use: microseconds, or `max`, and the period they are for."""


@dataclass(frozen=True)
class Share:
    """Copies of the network, and the threads of each."""

    instances: int
    threads: int


def share_cores(instances: int | None, threads: int | None, cores: int) -> Share:
    """What is given counts; what is left out is chosen so that all cores are used, by one thread a copy where both are."""
    chosen = instances or max(1, cores // (threads or 1))
    return Share(chosen, threads or max(1, cores // chosen))


def usable_cores(quota: Path = CGROUP_QUOTA) -> int:
    """Cores that this process may use: those it may run on, and no more than its container's quota pays for."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        time_us, period_us = quota.read_text().split()
        return allowed if time_us == "max" else min(allowed, max(1, math.ceil(int(time_us) / int(period_us))))
    except (OSError, ValueError):
        return allowed


def wake_without_preempting() -> None:
    """Let a thread of this process that is woken wait for a core instead of taking it from one that computes. Linux only.

    A call wakes half a dozen threads, one after the other; each would stop the event loop to do what takes microseconds, or only to find
    that the loop holds the interpreter's lock. Threads made later do the same; a scheduling policy that the operator chose stays.
    """
    if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with suppress(OSError):  # a sandbox may forbid it, and all works without
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


KEPT_BYTES = 128 << 20
"""Freed memory that stays with the process: a hundred images of 224 px and the messages that they came in."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Tell glibc to use freed memory again instead of giving it back: each image of 602 KB costs 150 page faults otherwise. Linux only.

    All threads share what is free: a message is received in one and let go in another, and would find other memory, in no cache, each time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES >> 2)
        libc.mallopt(_M_ARENA_MAX, 1)


def freeze_heap() -> None:
    """Let Python's garbage collector pass over all that is loaded by now: it holds the interpreter's lock while it walks a heap.

    The libraries alone are a quarter of a million objects, a tenth of a second in which no request is read and no batch begun, every few
    seconds under load. What is made later is collected as ever.
    """
    gc.collect()
    gc.freeze()
