"""What near-duplicate removal costs beside the bare k-NN search of the same vectors, and how it grows.

    .venv/bin/python -m benchmarks.curation

Vectors are synthetic: unit rows of width 384 around many centres, one in ten a near-duplicate of another. The bare search builds the same
index and asks it for the same neighbours, and keeps nothing; removal writes pairs to files, joins components and chooses what stays. Both
run in processes of their own, whose peak memory is told. `recall` is that of the search against exact search, on other rows than those it
was set by; `found` the share of planted duplicates that fell.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import tyro

from curation.deduplicate import DeduplicateSpec, join_near, near_pairs
from curation.folder import Folder, Stage
from curation.neighbours import (
    BLOCK,
    SearchSpec,
    block_starts,
    build_index,
    exact_neighbours,
    lists_to_read,
    recall,
    unit_rows,
)
from curation.workers import HereWorkers
from data.errors import InputError, run_cli

WIDTH = 384
PLANTED = 0.1
_ROWS = 50_000
_SAMPLE = 200


def make_vectors(path: Path, n: int) -> np.ndarray:
    """Write `n` unit rows to `path`; returns, for each planted duplicate, its row and that of its original, int [P, 2]."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(10, n // 200), WIDTH)).astype(np.float32)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, WIDTH))
    for start in range(0, n, _ROWS):
        rows = min(_ROWS, n - start)
        noise = rng.normal(size=(rows, WIDTH)).astype(np.float32)
        out[start : start + rows] = unit_rows(centres[rng.integers(0, len(centres), rows)] + noise)
    copies = rng.choice(n // 2, int(PLANTED * n), replace=False) + n // 2
    sources = rng.integers(0, n // 2, len(copies))
    for start in range(0, len(copies), _ROWS):
        part = slice(start, start + _ROWS)
        noise = rng.normal(size=(len(copies[part]), WIDTH)).astype(np.float32)
        out[copies[part]] = unit_rows(out[sources[part]] + 0.4 / WIDTH**0.5 * noise)
    out.flush()
    return np.stack([copies, sources], axis=1)


def bare(file: Path, spec: DeduplicateSpec, searching: SearchSpec) -> dict[str, Any]:
    """The search alone."""
    features_nD = np.load(file, mmap_mode="r")
    began = time.perf_counter()
    index = build_index(features_nD, searching)
    if n_lists := lists_to_read(index, features_nD, features_nD, searching, spec.k + 1):
        index.nprobe = n_lists
    for start in block_starts(len(features_nD)):
        index.search(np.ascontiguousarray(features_nD[start : start + BLOCK]), spec.k + 1)
    took = time.perf_counter() - began
    rows = np.random.default_rng(99).choice(len(features_nD), min(len(features_nD), _SAMPLE), replace=False)
    queries = np.ascontiguousarray(features_nD[np.sort(rows)])
    found = recall(index.search(queries, spec.k + 1)[1], exact_neighbours(queries, features_nD, spec.k + 1)[1])
    return {"seconds": took, "recall": found, "lists": getattr(index, "nlist", 0), "lists_read": n_lists}


def whole(file: Path, spec: DeduplicateSpec, searching: SearchSpec, planted_P2: np.ndarray) -> dict[str, Any]:
    """Removal of near-duplicates, from the vectors to who stays."""
    began = time.perf_counter()
    folder = Folder(file.parent / "curation")
    within, _ = near_pairs(Stage(file.parent, "vectors"), None, spec, searching, folder, HereWorkers())
    n = len(np.load(file, mmap_mode="r"))
    near = join_near(within, [], np.ones(n), spec)
    took = time.perf_counter() - began
    fell = near.component_m[planted_P2[:, 0]] == near.component_m[planted_P2[:, 1]]
    kept = int((near.best_m == np.arange(n)).sum())
    return {"seconds": took, "found": float(fell.mean()), "kept": kept}


def measure(part: str, folder: Path, threads: int | None, spec: DeduplicateSpec) -> dict[str, Any]:
    """One part in this process, with its peak memory."""
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    file, searching = folder / "features.npy", SearchSpec()
    found = (
        bare(file, spec, searching) if part == "bare" else whole(file, spec, searching, np.load(folder / "planted.npy"))
    )
    # resident memory counts pages of the mapped vectors that happen to be cached, so this is an upper bound
    return found | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main(
    n: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    threads: int | None = None,
    part: str | None = None,
    folder: Path | None = None,
) -> None:
    """Measure removal beside the bare search.

    Args:
        n: Numbers of vectors.
        threads: Threads of the search; all cores if not given.
        part: Measure `bare` or `whole` here and print JSON; for the processes that this command starts.
        folder: Where the vectors of `part` lie.
    """
    spec = DeduplicateSpec(threshold=0.9, whiten=0)
    if part is not None:
        if part not in ("bare", "whole") or folder is None:
            raise InputError("--part takes bare or whole, and wants --folder")
        print(json.dumps(measure(part, folder, threads, spec)))
        return
    print(f"width {WIDTH}, k {spec.k}, one in {round(1 / PLANTED)} planted, {threads or 'all'} threads")
    heads = ("bare s", "removal s", "ratio", "recall", "found", "s a million", "peak GiB", "lists read")
    print(f"{'vectors':>10}" + "".join(f"{head:>13}" for head in heads))
    for number in n:
        with tempfile.TemporaryDirectory(prefix="bench-curation-") as scratch:
            np.save(Path(scratch) / "planted.npy", make_vectors(Path(scratch) / "features.npy", number))
            alone, removal = (_in_process(name, scratch, threads) for name in ("bare", "whole"))
        figures = (
            f"{alone['seconds']:.1f}",
            f"{removal['seconds']:.1f}",
            f"{removal['seconds'] / alone['seconds']:.2f}",
            f"{alone['recall']:.3f}",
            f"{removal['found']:.3f}",
            f"{removal['seconds'] / number * 1e6:.0f}",
            f"{removal['peak_gib']:.2f}",
            f"{alone['lists_read']}/{alone['lists']}",
        )
        print(f"{number:>10,}" + "".join(f"{figure:>13}" for figure in figures), flush=True)


def _in_process(part: str, folder: str, threads: int | None) -> dict[str, Any]:
    words = ["--part", part, "--folder", folder, *(["--threads", str(threads)] if threads else [])]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.curation", *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m benchmarks.curation"))
