"""A data set in, what its pixels say and what a network says of it out: the two passes over images, block by block.

Legend: n images of the data set, m images that are embedded, D feature size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from curation.filters import FilterSpec, load_hook, look_at
from curation.folder import Folder, Stage, replacing
from curation.hashes import PCA_SIDE, dct_hash, pca_hash, shrink
from curation.neighbours import unit_rows
from curation.workers import Workers
from data.datasets import Dataset
from data.errors import CheckFailed, InputError
from evaluators.extract import ExtractSpec, extract
from runtimes.open import open_runtime
from runtimes.runtime import Runtime

BLOCK_IMAGES = 1024
"""Images of a block: what an interrupted pass has to do again at most."""


@dataclass(frozen=True)
class Looks:
    """What the pixels of n images say."""

    size_n2: np.ndarray
    """Width and height in pixels, int [n, 2]; 0 for a broken image."""
    reasons: list[str]
    """Why a filter drops it; empty for one that stays."""
    dct_n: np.ndarray
    pca_n: np.ndarray
    """Perceptual hashes, uint64 [n]; 0 for a broken image."""

    @property
    def kept_n(self) -> np.ndarray:
        """Which images stay, bool [n]."""
        return np.array([not reason for reason in self.reasons])

    @property
    def quality_n(self) -> np.ndarray:
        """Pixels of each image: of near-duplicates the largest stays."""
        return self.size_n2.prod(axis=1)


def blocks_of(rows: Sequence[int], block: int = BLOCK_IMAGES) -> list[tuple[int, list[int]]]:
    """Numbered blocks of rows."""
    return [(start // block, list(rows[start : start + block])) for start in range(0, len(rows), block)]


def look_over(dataset: Dataset, spec: FilterSpec, folder: Folder, workers: Workers) -> Looks:
    """Decode every image once: filters, sizes and hashes."""
    stage = folder.stage("look", data=dataset.fingerprint(), spec=asdict(spec))
    if not stage.done:
        load_hook(spec.reject, "--reject")
        tasks = [(rows, stage.path / f"block_{number:06d}.npz") for number, rows in blocks_of(range(len(dataset)))]
        workers.run("looking at images", look_block, (dataset, spec), tasks)
        _join_looks(stage, [path for _, path in tasks])
        stage.finish()
        for _, path in tasks:
            path.unlink()
    found = stage.load("looks")
    return Looks(found["size"], found["reason"].tolist(), found["dct"], found["pca"])


def look_block(dataset: Dataset, spec: FilterSpec, rows: Sequence[int], out: Path) -> None:
    """Look at some images and write what was seen."""
    if out.is_file():
        return
    reject = load_hook(spec.reject, "--reject")
    looks = [look_at(dataset, row, spec, reject) for row in rows]
    grays = [np.zeros((PCA_SIDE, PCA_SIDE), np.uint8) if look.gray is None else look.gray for look in looks]
    with replacing(out) as path, path.open("wb") as file:
        np.savez(
            file,
            size=np.array([(look.width, look.height) for look in looks], np.int64).reshape(-1, 2),
            reason=np.array([look.reason for look in looks], dtype=str),
            dct=np.array([0 if look.gray is None else dct_hash(look.gray) for look in looks], np.uint64),
            shrunk=np.stack([shrink(gray) for gray in grays]),
        )


def _join_looks(stage: Stage, files: Sequence[Path]) -> None:
    blocks = []
    for file in files:
        with np.load(file, allow_pickle=False) as block:
            blocks.append(dict(block))
    size_n2, reason_n, dct_n, shrunk_nHW = (
        np.concatenate([block[name] for block in blocks]) for name in ("size", "reason", "dct", "shrunk")
    )
    pca_n, seen = np.zeros(len(size_n2), np.uint64), size_n2[:, 0] > 0
    if seen.any():
        pca_n[seen] = pca_hash(shrunk_nHW[seen])
    stage.save("looks", size=size_n2, reason=reason_n, dct=dct_n, pca=pca_n)


def embed(
    dataset: Dataset, rows: Sequence[int], ckpt: str, device: str, threads: int | None, folder: Folder, workers: Workers
) -> Stage:
    """The stage whose `features.npy` holds unit-length embeddings of some images, float32 [m, D]. Raises CheckFailed."""
    with open_runtime(ckpt, device=device, threads=threads) as runtime:
        model = {"weights": runtime.manifest.weights_sha256, "preprocess": runtime.manifest.preprocess.to_json()}
    stage = folder.stage("embed", data=dataset.fingerprint(), rows=_rows_key(rows), **model)
    if not stage.done:
        tasks = [(block, stage.path / f"block_{number:06d}.npy") for number, block in blocks_of(rows)]
        workers.run("embedding images", embed_block, (dataset, ckpt, device, threads), tasks)
        _join_features(stage, [path for _, path in tasks], len(rows))
        stage.finish({"n": len(rows)})
        for _, path in tasks:
            path.unlink()
    return stage


def embed_block(dataset: Dataset, ckpt: str, device: str, threads: int | None, rows: Sequence[int], out: Path) -> None:
    """Embed some images and write their unit rows, float32 [b, D]."""
    if out.is_file():
        return
    runtime = _runtime(ckpt, device, threads)
    table = extract(runtime, dataset.subset(rows), ExtractSpec(columns=("embedding",)))
    if len(table) != len(rows):
        name, reason = table.skipped[0]
        raise CheckFailed(f"{name}: could be decoded before and now cannot ({reason}); was it changed meanwhile?")
    with replacing(out) as path, path.open("wb") as file:
        np.save(file, unit_rows(table.features))


@lru_cache(maxsize=1)
def _runtime(ckpt: str, device: str, threads: int | None) -> Runtime:
    return open_runtime(ckpt, device=device, threads=threads)


def _join_features(stage: Stage, files: Sequence[Path], n: int) -> None:
    """One file of all blocks, a block in memory at a time."""
    if not files:
        raise InputError("no image is left to embed: the filters dropped them all")
    width = np.load(files[0], mmap_mode="r").shape[1]
    with replacing(stage.path / "features.npy") as path:
        joined: Any = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, width))
        start = 0
        for file in files:
            block = np.load(file, mmap_mode="r")
            joined[start : start + len(block)] = block
            start += len(block)
        joined.flush()


def _rows_key(rows: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()[:20]
