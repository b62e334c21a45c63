"""A data set and several processes in, one complete entry of the feature cache out.

Each process opens the network for itself, on a GPU of its own where there are several, and extracts a stretch of the
images into an entry of its own; the entries are then joined to the one that a single process would have made. A part
that is complete, or half done, is kept when something stops, so a killed extraction goes on where each process was.
Read in this order: Helpers, extract_by_processes.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from data.datasets import Dataset
from data.errors import CheckFailed, InputError
from evaluators.extract import ExtractSpec, available_columns, check_share, extract, extraction_key
from evaluators.feature_cache import open_store
from runtimes.open import open_runtime
from runtimes.runtime import Runtime

POLL_S = 0.2


@dataclass(frozen=True)
class Helpers:
    """How a process opens the network."""

    ckpt: str
    device: str
    threads: int | None
    processes: int


def extract_by_processes(
    runtime: Runtime,
    dataset: Dataset,
    spec: ExtractSpec,
    helpers: Helpers,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Complete the cache entry of this extraction; returns whether it was complete already.

    Raises what a process raised, InputError where one was killed, and as `extract` does.
    """
    columns, n = available_columns(runtime, spec.columns), len(dataset.items)
    with open_store(spec.cache_dir, extraction_key(runtime, dataset, columns, spec), n) as store:
        if store.complete:
            return True
        first = store.next_item
        edges = [first + (n - first) * number // helpers.processes for number in range(helpers.processes + 1)]
        stretches = [range(start, stop) for start, stop in pairwise(edges) if stop > start]
        parts = [dataset.subset(stretch) for stretch in stretches]
        loose = replace(spec, max_corrupt_share=1.0, columns=columns, augmented=())
        _run(parts, loose, helpers, (lambda done: progress(first + done, n)) if progress else None)
        for stretch, part in zip(stretches, parts, strict=True):
            with open_store(spec.cache_dir, extraction_key(runtime, part, columns, spec), len(part)) as made:
                skipped = {stretch.start + row: reason for row, reason in made.skipped.items()}
                store.append(made.columns(), len(part), skipped)
        check_share(store, dataset, spec.max_corrupt_share)
        store.finish()
    for part in parts:
        with open_store(spec.cache_dir, extraction_key(runtime, part, columns, spec), len(part)) as made:
            made.discard()
    return False


def _run(parts: Sequence[Dataset], spec: ExtractSpec, helpers: Helpers, progress: Callable[[int], None] | None) -> None:
    """One process a part, until all are done."""
    context = multiprocessing.get_context("spawn")
    done: Any = context.Array("q", len(parts))
    errors: Any = context.SimpleQueue()
    processes: list[SpawnProcess] = [
        context.Process(target=_work, args=(number, part, spec, helpers, done, errors), daemon=True)
        for number, part in enumerate(parts)
    ]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes):
                break
            time.sleep(POLL_S)
            if progress:
                progress(sum(done[:]))
    finally:
        for process in processes:
            process.terminate()
            process.join()
    if not errors.empty():
        kind, message = errors.get()
        raise (CheckFailed if kind == "check" else InputError)(message)
    if lost := [process.exitcode for process in processes if process.exitcode]:
        raise InputError(
            f"a process of the extraction ended with status {lost[0]} (out of memory?); "
            "run the same command again to go on, or use fewer --processes"
        )


def _work(number: int, part: Dataset, spec: ExtractSpec, helpers: Helpers, done: Any, errors: Any) -> None:
    """What a process does: its part into its cache entry."""

    def note(count: int, _: int) -> None:
        done[number] = count

    gpus = torch.cuda.device_count() if helpers.device != "cpu" else 0
    if gpus > 1:  # before CUDA starts in this process
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    try:
        if helpers.threads is not None:
            torch.set_num_threads(helpers.threads)
        with open_runtime(helpers.ckpt, device=helpers.device, threads=helpers.threads) as runtime:
            extract(runtime, part, spec, note)
    except (InputError, CheckFailed) as error:
        errors.put(("check" if isinstance(error, CheckFailed) else "input", str(error)))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
