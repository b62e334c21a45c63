"""A heap of images in, the same without near-duplicates, and without anything near an evaluation set, out.

The steps of LVD-142M (Oquab et al. 2023, section 3 and appendix A): filters; a perceptual hash; then embeddings, k = 64 neighbours, edges
above a cosine threshold, connected components, one image of each kept; then components that hold a neighbour of an evaluation image are
dropped whole. Read in this order: DeduplicateSpec, deduplicate, decide.

Legend: n images of the heap, m of them embedded (in the order of `rows`).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from curation.command import CurationOptions, close, opened
from curation.components import connected_components, representatives
from curation.decisions import Decision
from curation.filters import FilterSpec
from curation.folder import Folder, Stage
from curation.hashes import BITS, distances, pairs_within
from curation.images import Looks, look_over
from curation.near import search
from curation.neighbours import SearchSpec, pairs_above
from curation.report import Example, Histogram, Picture, histogram_of
from curation.whitening import whitened
from curation.workers import Workers
from data.datasets import Dataset, open_dataset
from data.errors import InputError, run_cli

NO_FILTER = FilterSpec(min_side_px=1, max_aspect=float("inf"), min_deviation=0.0)
"""Of an evaluation set every image counts that can be decoded."""
EXAMPLES, PICTURES = 24, 12
"""Groups on the page, and thumbnails of each."""


@dataclass(frozen=True, kw_only=True)
class DeduplicateSpec:
    """What counts as a duplicate."""

    hash: Literal["dct", "pca", "none"] = "dct"
    """The perceptual hash of the first pass."""
    hash_bits: int = 4
    """Images whose hashes differ in at most so many of 64 bits are duplicates."""
    whiten: int = 128
    """Main directions of the heap's embeddings that are compared, each with the same weight; 0 compares embeddings as they are, which suits
    networks made for copy detection. See `whitening`."""
    k: int = 64
    """Neighbours of each image that are looked at (LVD-142M: 64)."""
    threshold: float = 0.6
    """Images with a higher cosine are duplicates (LVD-142M: 0.6, for embeddings made for copy detection). `python -m curation.calibrate`
    shows what another network wants."""
    eval_threshold: float = 0.45
    """The same towards evaluation images (LVD-142M: 0.45)."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.whiten < 0:
            raise InputError(
                f"--k {self.k} --whiten {self.whiten}: wanted at least 1 neighbour, and no fewer than 0 directions"
            )
        if not 0 <= self.hash_bits < BITS // 2:
            raise InputError(f"--hash-bits {self.hash_bits}: wanted 0 to {BITS // 2 - 1}")
        for name in ("threshold", "eval_threshold"):
            if not -1 <= getattr(self, name) <= 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: wanted a cosine, -1 to 1")


@dataclass(frozen=True)
class Near:
    """For each of m embedded images, what speaks against it."""

    component_m: np.ndarray
    """Component, named by its smallest member."""
    best_m: np.ndarray
    """The image of its component that stays."""
    cosine_m: np.ndarray
    """Largest cosine to another image of its component; NaN for one that is alone."""
    eval_row_m: np.ndarray
    """The evaluation image that it, or an image joined to it above the evaluation threshold, is too near to; -1 for none."""
    eval_cosine_m: np.ndarray


def hash_components(looks: Looks, spec: DeduplicateSpec) -> np.ndarray:
    """Component by perceptual hash of each of n images that passed the filters, int64 [n]; the others stand alone."""
    n = len(looks.reasons)
    if spec.hash == "none":
        return np.arange(n)
    rows = np.flatnonzero(looks.kept_n)
    hashes = (looks.dct_n if spec.hash == "dct" else looks.pca_n)[rows]
    return connected_components(n, (rows[edges] for edges in pairs_within(hashes, spec.hash_bits)))


def near_pairs(
    heap: Stage,
    evaluation: Stage | None,
    spec: DeduplicateSpec,
    searching: SearchSpec,
    folder: Folder,
    workers: Workers,
) -> tuple[list[Path], list[Path]]:
    """Files of near pairs within the heap, and of each heap image's nearest evaluation image."""
    lowest = spec.threshold if evaluation is None else min(spec.threshold, spec.eval_threshold)
    # k + 1, because the nearest neighbour of an image is itself
    within = search("near pairs", heap, heap, spec.k + 1, lowest, searching, folder, workers)
    if evaluation is None:
        return within, []
    return within, search("near evaluation", heap, evaluation, 1, spec.eval_threshold, searching, folder, workers)


def join_near(within: Sequence[Path], across: Sequence[Path], quality_m: np.ndarray, spec: DeduplicateSpec) -> Near:
    """Components of duplicates, what stays of each, and what is too near an evaluation image.

    `within` and `across` are the files of `near_pairs`; of a component the image of the highest quality stays.
    """
    m = len(quality_m)
    component_m = connected_components(m, (pairs for pairs, _ in pairs_above(within, spec.threshold, of_one_set=True)))
    cosine_m = np.full(m, np.nan, np.float32)
    for pairs_E2, cosines_E in pairs_above(within, spec.threshold, of_one_set=True):
        for side in (0, 1):
            np.fmax.at(cosine_m, pairs_E2[:, side], cosines_E)
    eval_row_m, eval_cosine_m = np.full(m, -1), np.full(m, np.nan, np.float32)
    for pairs_E2, cosines_E in pairs_above(across, spec.eval_threshold, of_one_set=False):
        eval_row_m[pairs_E2[:, 0]], eval_cosine_m[pairs_E2[:, 0]] = pairs_E2[:, 1], cosines_E
    if across:
        joined = (pairs for pairs, _ in pairs_above(within, spec.eval_threshold, of_one_set=True))
        eval_row_m, eval_cosine_m = _spread(connected_components(m, joined), eval_row_m, eval_cosine_m)
    return Near(component_m, representatives(component_m, quality_m), cosine_m, eval_row_m, eval_cosine_m)


def _spread(component_m: np.ndarray, eval_row_m: np.ndarray, cosine_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give every image of a component the evaluation image that the component is nearest to."""
    touched = np.flatnonzero(eval_row_m >= 0)
    nearest = touched[np.lexsort((touched, -cosine_m[touched], component_m[touched]))]
    first = np.unique(component_m[nearest], return_index=True)[1]
    speaks = np.full(len(component_m), -1)
    speaks[component_m[nearest[first]]] = nearest[first]
    witness_m = speaks[component_m]
    found = witness_m >= 0
    rows, cosines = np.full_like(eval_row_m, -1), np.full_like(cosine_m, np.nan)
    rows[found], cosines[found] = eval_row_m[witness_m[found]], cosine_m[witness_m[found]]
    return rows, cosines


def decide(
    names: Sequence[str],
    looks: Looks,
    by_hash_n: np.ndarray,
    rows: Sequence[int],
    near: Near,
    eval_names: Sequence[str],
    spec: DeduplicateSpec,
) -> list[Decision]:
    """What becomes of each of n images. `rows` are those that were embedded: the best of each hash component."""
    decisions = [Decision("dropped", "filter", reason) if reason else Decision("kept") for reason in looks.reasons]
    best_n = representatives(by_hash_n, np.where(looks.kept_n, looks.quality_n, -1))
    hashes = looks.pca_n if spec.hash == "pca" else looks.dct_n
    for row in np.flatnonzero(looks.kept_n & (best_n != np.arange(len(names)))).tolist():
        bits = float(distances(hashes[row : row + 1], hashes[best_n[row : row + 1]])[0])
        decisions[row] = Decision("dropped", "hash", f"same {spec.hash} hash", names[best_n[row]], bits)
    for place, row in enumerate(rows):
        if near.eval_row_m[place] >= 0:
            of, cosine = eval_names[near.eval_row_m[place]], float(near.eval_cosine_m[place])
            decisions[row] = Decision(
                "dropped", "evaluation", "near an evaluation image, or joined to one that is", of, cosine
            )
        elif near.best_m[place] != place:
            of, cosine = names[rows[near.best_m[place]]], float(near.cosine_m[place])
            decisions[row] = Decision("dropped", "embedding", "near-duplicate", of, cosine)
    return decisions


def deduplicate(
    dataset: Dataset,
    evaluation: Dataset | None,
    options: CurationOptions,
    spec: DeduplicateSpec,
    filters: FilterSpec,
    searching: SearchSpec,
) -> list[Decision]:
    """Curate `dataset` into `options.out`; returns what became of each image. Raises InputError, CheckFailed."""
    folder, workers, embedding = opened(options)
    looks = look_over(dataset, filters, folder, workers)
    by_hash_n = hash_components(looks, spec)
    best_n = representatives(by_hash_n, np.where(looks.kept_n, looks.quality_n, -1))
    rows = np.flatnonzero(looks.kept_n & (best_n == np.arange(len(dataset)))).tolist()
    heap, held, eval_names = embedding(dataset, rows), None, []
    if evaluation is not None:
        readable = np.flatnonzero(look_over(evaluation, NO_FILTER, folder, workers).kept_n).tolist()
        held, eval_names = embedding(evaluation, readable), [evaluation.items[row].name for row in readable]
    if held is not None:
        held = whitened(held, heap, spec.whiten, folder)
    heap = whitened(heap, heap, spec.whiten, folder)
    within, across = near_pairs(heap, held, spec, searching, folder, workers)
    near = join_near(within, across, looks.quality_n[rows], spec)
    decisions = decide([item.name for item in dataset.items], looks, by_hash_n, rows, near, eval_names, spec)
    settings = (
        asdict(spec)
        | asdict(filters)
        | {"ckpt": options.ckpt, "data": options.data, "evaluation": getattr(evaluation, "name", "")}
    )
    histograms = [cosine_histogram(within, spec), component_histogram(decisions)]
    close(
        options,
        dataset,
        decisions,
        "Near-duplicates removed",
        settings,
        histograms,
        examples_of(dataset, evaluation, decisions),
    )
    return decisions


def cosine_histogram(within: Sequence[Path], spec: DeduplicateSpec) -> Histogram:
    """Cosines of all near pairs above the lower of both thresholds."""
    found = [cosines for _, cosines in pairs_above(within, -1.0, of_one_set=True)]
    low = min(spec.threshold, spec.eval_threshold)
    return histogram_of("Cosine of near pairs", np.concatenate(found), low, 1.0, mark=spec.threshold)


def component_histogram(decisions: Sequence[Decision]) -> Histogram:
    """Images dropped for one that stays, by how many fell to it."""
    fell = Counter(one.of for one in decisions if one.stage in ("hash", "embedding"))
    sizes = np.array(list(fell.values()) or [0])
    return histogram_of(
        "Duplicates of an image that stays", sizes, 0.5, max(sizes.max(), 10) + 0.5, bins=int(max(sizes.max(), 10))
    )


def examples_of(
    dataset: Dataset, evaluation: Dataset | None, decisions: Sequence[Decision]
) -> dict[str, list[Example]]:
    """Thumbnails of what was dropped, beside what speaks against it: the largest groups of duplicates first."""
    row_of = {item.name: row for row, item in enumerate(dataset.items)}
    fell: dict[str, list[int]] = defaultdict(list)
    sections: dict[str, list[Example]] = {
        "Duplicates (green stays)": [],
        "Near an evaluation image": [],
        "Filtered": [],
    }
    for row, one in enumerate(decisions):
        if one.stage in ("hash", "embedding"):
            fell[one.of].append(row)
    for name, rows in sorted(fell.items(), key=lambda pair: -len(pair[1]))[:EXAMPLES]:
        shown = [Picture(dataset, row_of[name], name, kept=True)]
        shown += [
            Picture(dataset, row, f"{decisions[row].stage} {decisions[row].score:.3g}: {dataset.items[row].name}")
            for row in rows[:PICTURES]
        ]
        sections["Duplicates (green stays)"].append(Example(f"{len(rows)} dropped for {name}", shown))
    if evaluation is not None:
        eval_row = {item.name: row for row, item in enumerate(evaluation.items)}
        for row in [row for row, one in enumerate(decisions) if one.stage == "evaluation"][:EXAMPLES]:
            one = decisions[row]
            pair = [
                Picture(evaluation, eval_row[one.of], f"evaluation: {one.of}", kept=True),
                Picture(dataset, row, dataset.items[row].name),
            ]
            sections["Near an evaluation image"].append(Example(f"cosine {one.score:.3f}", pair))
    dropped = [row for row, one in enumerate(decisions) if one.stage == "filter"][:PICTURES]
    if dropped:
        pictures = [Picture(dataset, row, f"{decisions[row].reason}: {dataset.items[row].name}") for row in dropped]
        sections["Filtered"].append(Example("some of them", pictures))
    return sections


def main(
    options: Annotated[CurationOptions, tyro.conf.arg(name="")],
    spec: Annotated[DeduplicateSpec, tyro.conf.arg(name="")],
    filters: Annotated[FilterSpec, tyro.conf.arg(name="")],
    searching: Annotated[SearchSpec, tyro.conf.arg(name="")],
    evaluation: str | None = None,
) -> None:
    """Remove near-duplicates from a heap of images, and whatever is near an evaluation set.

    Run the same command again to go on after an interruption.

    Args:
        options: What is curated.
        spec: What counts as a duplicate.
        filters: What is dropped first.
        searching: How neighbours are searched.
        evaluation: Images (all splits) that the curated set must be kept clear of: any data set, or several joined by commas.
    """
    held = None if evaluation is None else open_dataset(evaluation)
    deduplicate(open_dataset(options.data, options.split), held, options, spec, filters, searching)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m curation.deduplicate"))
