"""Labelled pairs in, what each threshold finds of them out: so that a user can set thresholds for a network of their own.

Two questions, one table each. On a set whose column `group` says which images are copies of one another: precision and recall of every
threshold, over all pairs. On any set: copies are planted (cropped, shrunk, recompressed, mirrored, recoloured, written over) and counted as
found by kind.

Legend: n images, T thresholds.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tyro

from curation.alterations import ALTERATIONS
from curation.deduplicate import NO_FILTER, DeduplicateSpec
from curation.filters import look_at
from curation.folder import replacing
from curation.hashes import dct_hash, distances
from curation.neighbours import unit_rows
from curation.whitening import fit_whitening
from data.datasets import Dataset, open_dataset
from data.decode import DecodeError
from data.errors import InputError, run_cli
from data.preprocess import center_view
from evaluators.extract import ExtractSpec, extract
from runtimes.open import open_runtime
from runtimes.runtime import Runtime

COSINES = np.round(np.arange(0.30, 0.9951, 0.01), 2)
_BLOCK = 2048
HEAP_IMAGES = 2048
"""Images of the heap, evenly spaced, that the whitening is fitted on here."""
DEFAULTS = DeduplicateSpec()
Describe = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Curve:
    """Precision and recall over all pairs of a set at each threshold, [T]."""

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    def lowest_with(self, precision: float) -> int | None:
        """Place of the threshold with the highest recall whose precision is at least this; None where there is none."""
        enough = np.flatnonzero(self.precision >= precision)
        return None if not len(enough) else int(enough[np.argmax(self.recall[enough])])


def cosine_curve(unit_nD: np.ndarray, groups_n: np.ndarray) -> Curve:
    """Pairs of one group against all others, by cosine above a threshold; a block of pairs in memory at a time."""
    same, every = np.zeros(len(COSINES)), np.zeros(len(COSINES))
    n_same = 0
    for start in range(0, len(unit_nD), _BLOCK):
        cosines = unit_nD[start : start + _BLOCK] @ unit_nD[start:].T
        later = np.triu(np.ones_like(cosines, dtype=bool), 1)
        equal = later & (groups_n[start : start + _BLOCK, None] == groups_n[None, start:])
        n_same += int(equal.sum())
        every += _above(cosines[later])
        same += _above(cosines[equal])
    if n_same == 0:
        raise InputError("no two images are of one group; wanted a column `group` that ties copies together")
    return Curve(COSINES, np.divide(same, every, out=np.ones_like(same), where=every > 0), same / n_same)


def _above(cosines: np.ndarray) -> np.ndarray:
    return len(cosines) - np.searchsorted(np.sort(cosines), COSINES, side="right")


def hash_curve(hashes_n: np.ndarray, groups_n: np.ndarray, most: int = 16) -> Curve:
    """The same by perceptual hash: pairs at most 0, 1, ... bits apart."""
    rows, columns = np.triu_indices(len(hashes_n), 1)
    bits = distances(hashes_n[rows], hashes_n[columns])
    equal = groups_n[rows] == groups_n[columns]
    levels = np.arange(most + 1)
    every = np.array([(bits <= level).sum() for level in levels])
    same = np.array([(bits[equal] <= level).sum() for level in levels])
    return Curve(levels, np.where(every > 0, same / np.maximum(every, 1), 1.0), same / max(equal.sum(), 1))


def recall_by_kind(
    unit_nD: np.ndarray, groups_n: np.ndarray, kinds_n: np.ndarray, threshold: float
) -> dict[str, tuple[float, int]]:
    """Share of the images of each kind that some image of their group is near to, and how many of the kind have such an image."""
    cosines = unit_nD @ unit_nD.T
    np.fill_diagonal(cosines, -1)
    cosines[groups_n[:, None] != groups_n[None]] = -1
    best_n = cosines.max(axis=1)
    has_n = best_n > -1
    found = {}
    for kind in np.unique(kinds_n[has_n]):
        mine = has_n & (kinds_n == kind)
        found[str(kind)] = (float((best_n[mine] > threshold).mean()), int(mine.sum()))
    return found


def planted_recall(
    runtime: Runtime, describe: Describe, dataset: Dataset, n: int, spec: DeduplicateSpec, seed: int
) -> dict[str, dict[str, float]]:
    """Share of planted copies of n images that the embedding and the hash find, by kind; `none` holds what they find between strangers."""
    rng = np.random.default_rng(seed)
    originals = _images(dataset, rng.permutation(len(dataset)), n)
    base_nD, base_hash = _look(runtime, describe, originals)
    cosines = base_nD @ base_nD.T
    strangers = np.triu_indices(len(originals), 1)
    bits = distances(base_hash[strangers[0]], base_hash[strangers[1]])
    found = {
        "none": {
            "embedding": float((cosines[strangers] > spec.threshold).mean()),
            "hash": float((bits <= spec.hash_bits).mean()),
        }
    }
    for kind, alter in ALTERATIONS.items():
        unit_nD, hashes = _look(runtime, describe, [alter(image, rng) for image in originals])
        near = np.einsum("nd,nd->n", base_nD, unit_nD)
        found[kind] = {
            "embedding": float((near > spec.threshold).mean()),
            "hash": float((distances(base_hash, hashes) <= spec.hash_bits).mean()),
            "median_cosine": float(np.median(near)),
        }
    return found


def _images(dataset: Dataset, order: np.ndarray, n: int) -> list[np.ndarray]:
    images: list[np.ndarray] = []
    for row in order.tolist():
        if len(images) == n:
            break
        try:
            images.append(dataset.image(row))
        except DecodeError:
            continue
    if len(images) < 2:
        raise InputError(f"{dataset.name}: {len(images)} readable image; wanted at least 2 to plant copies of")
    return images


def _look(runtime: Runtime, describe: Describe, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings [n, D] and hashes [n] of decoded images."""
    rows = []
    for start in range(0, len(images), 64):
        pixels = np.stack([center_view(image, runtime.manifest.preprocess) for image in images[start : start + 64]])
        rows.append(runtime.run(pixels, ("embedding",))["embedding"])
    grays = [
        cv2.cvtColor(cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY) for image in images
    ]
    return describe(np.concatenate(rows)), np.array([dct_hash(gray) for gray in grays], np.uint64)


def calibrate(
    runtime: Runtime, dataset: Dataset, heap: Dataset, precision: float, spec: DeduplicateSpec, plant: int, seed: int
) -> dict[str, Any]:
    """All figures of the command as a plain object; without a column `group` only those of planted copies.

    `heap` are the images that the whitening is fitted on.
    """
    describe = describer(runtime, heap, spec.whiten)
    result: dict[str, Any] = {
        "data": dataset.name,
        "weights_sha256": runtime.manifest.weights_sha256,
        "wanted_precision": precision,
        "whiten": spec.whiten,
    }
    if dataset.items and "group" in dataset.items[0].row:
        table = extract(runtime, dataset, ExtractSpec(columns=("embedding",), group_column="group"))
        groups_n = np.unique(np.array(table.groups), return_inverse=True)[1]
        unit_nD = describe(table.features)
        curve = cosine_curve(unit_nD, groups_n)
        place = curve.lowest_with(precision)
        hashes = np.array([_hash_of(dataset, row) for row in table.rows], np.uint64)
        result |= {
            "cosine": _curve_json(curve),
            "hash_bits": _curve_json(hash_curve(hashes, groups_n)),
            "threshold": None if place is None else float(curve.thresholds[place]),
            "at_default": _at(curve, spec.threshold),
        }
        kinds_n = np.array([dataset.items[row].row.get("variant", "") for row in table.rows])
        if place is not None and kinds_n.any():
            by_kind = recall_by_kind(unit_nD, groups_n, kinds_n, float(curve.thresholds[place]))
            result["recall_by_kind"] = {kind: {"value": value, "n": n} for kind, (value, n) in by_kind.items()}
    if plant:
        result["planted"] = planted_recall(runtime, describe, dataset, plant, spec, seed)
    return result


def describer(runtime: Runtime, heap: Dataset, directions: int) -> Describe:
    """What turns embeddings into the unit rows that `deduplicate` compares: whitened as fits the heap, or just scaled."""
    if directions == 0:
        return unit_rows
    rows = np.unique(np.linspace(0, len(heap) - 1, min(len(heap), HEAP_IMAGES)).astype(np.int64))
    table = extract(runtime, heap.subset(rows), ExtractSpec(columns=("embedding",), max_corrupt_share=1.0))
    whitening = fit_whitening(unit_rows(table.features), directions)
    return lambda features_nD: whitening(unit_rows(features_nD))


def _hash_of(dataset: Dataset, row: int) -> np.uint64:
    gray = look_at(dataset, row, NO_FILTER, None).gray
    assert gray is not None, "it was decoded just now"
    return dct_hash(gray)


def _at(curve: Curve, threshold: float) -> dict[str, float]:
    place = int(np.abs(curve.thresholds - threshold).argmin())
    return {name: float(getattr(curve, name)[place]) for name in ("precision", "recall")} | {
        "threshold": float(curve.thresholds[place])
    }


def _curve_json(curve: Curve) -> list[dict[str, float]]:
    rows = zip(curve.thresholds, curve.precision, curve.recall, strict=True)
    return [{"threshold": float(t), "precision": round(float(p), 4), "recall": round(float(r), 4)} for t, p, r in rows]


def show(result: dict[str, Any]) -> None:
    """The result as a table for a terminal."""
    for name, title, every in (("cosine", "cosine above", 5), ("hash_bits", "hash bits at most", 2)):
        if name in result:
            print(f"{title:<20}{'precision':>10}{'recall':>10}")
            for row in result[name][::every]:
                print(f"{row['threshold']:<20g}{row['precision']:>10.3f}{row['recall']:>10.3f}")
    if "threshold" in result:
        best = result["threshold"]
        words = "no threshold reaches it" if best is None else f"--threshold {best:g}"
        print(f"for a precision of {result['wanted_precision']:g}: {words}")
    for kind, one in result.get("recall_by_kind", {}).items():
        print(f"  {kind:<18}{one['value']:>10.3f}  of {one['n']}")
    for kind, one in result.get("planted", {}).items():
        what = "pairs of strangers" if kind == "none" else f"planted {kind}"
        print(f"{what:<20}embedding {one['embedding']:.3f}, hash {one['hash']:.3f}")


def main(
    ckpt: str,
    data: str,
    out: Path | None = None,
    precision: float = 0.95,
    threshold: float = DEFAULTS.threshold,
    hash_bits: int = DEFAULTS.hash_bits,
    whiten: int = DEFAULTS.whiten,
    heap: str | None = None,
    plant: int = 200,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Show what thresholds of near-duplicate removal find, for this network and these images.

    Args:
        ckpt: The network whose embeddings are compared.
        data: Images; with a column `group` that ties copies together, precision and recall are shown.
        out: File to write all figures to (.json).
        precision: Share of pairs above the recommended threshold that shall be copies.
        threshold: Cosine at which planted copies are counted; as in curation.deduplicate.
        hash_bits: Differing bits of the hash at which they are counted; likewise.
        whiten: Main directions that are compared, 0 for embeddings as they are; likewise.
        heap: The images that shall be deduplicated, on which the whitening is fitted; `data` itself if left out.
        plant: Images of which copies are planted; 0 for none.
        seed: Of what is planted.
        device: Where the network runs: auto, cpu, cuda.
        threads: CPU threads.
    """
    if not 0 < precision <= 1 or plant < 0:
        raise InputError(
            f"--precision {precision} --plant {plant}: wanted a share above 0 and at most 1, and no fewer than 0"
        )
    spec = DeduplicateSpec(threshold=threshold, hash_bits=hash_bits, whiten=whiten)
    dataset = open_dataset(data)
    fitted_on = dataset if heap is None else open_dataset(heap)
    with open_runtime(ckpt, device=device, threads=threads) as runtime:
        result = calibrate(runtime, dataset, fitted_on, precision, spec, plant, seed)
    if out is not None:
        with replacing(out) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m curation.calibrate"))
