"""Features in, files of near pairs out: a search as a stage, done block by block by whichever workers there are.

Legend: q queries, n stored features, D feature size.
"""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from curation.folder import Folder, Stage, replacing
from curation.neighbours import SearchSpec, block_starts, build_index, lists_to_read, search_block
from curation.workers import Workers


def search(
    name: str,
    queries: Stage,
    stored: Stage,
    k: int,
    threshold: float,
    spec: SearchSpec,
    folder: Folder,
    workers: Workers,
) -> list[Path]:
    """Files of all pairs (query, stored) of the k nearest whose cosine is above `threshold`; see `neighbours.pairs_above`.

    Both stages hold `features.npy`, unit rows float32 [q, D] and [n, D]; they may be one stage.
    """
    index_file = _index(stored, spec, folder)
    stage = folder.stage(
        name, queries=queries.key, index=index_file.parent.name, k=k, threshold=threshold, spec=asdict(spec)
    )
    queries_qD = np.load(queries.path / "features.npy", mmap_mode="r")
    tasks = [(start, stage.path / f"pairs_{start:012d}.npz") for start in block_starts(len(queries_qD))]
    if not stage.done:
        stored_nD = np.load(stored.path / "features.npy", mmap_mode="r")
        n_lists = lists_to_read(_read_index(index_file), stored_nD, queries_qD, spec, min(k, len(stored_nD)))
        workers.run(name, search_file, (index_file, n_lists, queries.path / "features.npy", k, threshold), tasks)
        stage.finish({"queries": len(queries_qD), "lists_read": n_lists})
    return [path for _, path in tasks]


def search_file(
    index_file: Path, n_lists: int, features_file: Path, k: int, threshold: float, start: int, out: Path
) -> None:
    """One block of a search, with everything read from files."""
    index = _read_index(index_file)
    if n_lists:
        index.nprobe = n_lists
    search_block(index, np.load(features_file, mmap_mode="r"), start, k, threshold, out)


def _index(stored: Stage, spec: SearchSpec, folder: Folder) -> Path:
    """The file of an index over the features of `stored`."""
    stage = folder.stage("index", features=stored.key, flat_below=spec.flat_below)
    file = stage.path / "index.faiss"
    if not stage.done:
        index = build_index(np.load(stored.path / "features.npy", mmap_mode="r"), spec)
        with replacing(file) as path:
            faiss.write_index(index, str(path))
        stage.finish({"lists": getattr(index, "nlist", 0)})
    return file


@lru_cache(maxsize=1)
def _read_index(file: Path) -> Any:
    return faiss.read_index(str(file))
