"""Features in, how well altered copies of an image are found again: mean average precision.

An image is described by CLS followed by the pooled patches, optionally whitened, at length 1. On Copydays, the altered
images search the originals. On any other set, a column names groups of near-duplicates, and all pairs of images are
ranked by similarity; the figure is the average precision of the pairs of one group.
Read in this order: CopiesSpec, describe, evaluate_pairs, evaluate_copydays, run.
Legend: n images, q queries, D feature size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from data.datasets import Dataset, open_dataset
from data.errors import InputError, run_cli
from data.listings import IMAGE, Item, Record, images_under
from data.members import Member
from evaluators.accuracy import mean_metric
from evaluators.bootstrap import drawn_groups
from evaluators.classification import RunOptions, check_length, check_tables, print_result
from evaluators.extract import ExtractSpec, FeatureTable
from evaluators.measuring import Parts, evaluate_parts
from evaluators.neighbours import nearest, unit_rows
from evaluators.pair_precision import RankedPairs
from evaluators.presets import check_words, evaluator_cli, settled_by
from evaluators.ranking import average_precisions, trapezoid_precision
from evaluators.results import Measurement, Metric
from evaluators.view_batches import ViewSpec
from runtimes.runtime import Runtime, step_px

VERSION = 1
SEARCHED = 20
"""Copydays: only the first 20 results of a query count, as published."""
PREFIX = 4
"""Copydays: an image and its altered copies share the first 4 characters of their file names."""
WHITENING_POWER, WHITENING_FLOOR = 0.5, 1e-5
"""Published: eigenvalues to the power -0.5; those below 1e-5 of the largest are raised to it."""
MAX_PAIRED_IMAGES = 20_000
"""Similarities of more images than this, and where their pairs stand among those of one group, do not fit into 4 GB."""
QUERIES_AT_ONCE = 256
"""Images whose rankings of all others are held at a time."""


PRESETS: dict[str, dict[str, Any]] = {"dino": {"size_px": 320}, "dinov2": {"size_px": 322}}
"""What `--preset` sets."""


@settled_by(PRESETS)
@dataclass(frozen=True, kw_only=True)
class CopiesSpec:
    """The copy detection protocol."""

    preset: Literal["dino", "dinov2"] | None = None
    """dino: views of 320 px, as published; dinov2, which has no such evaluation: 322 (a multiple of its patch)."""
    size_px: int | None = None
    """Size of the view (the whole image, squashed), rounded down to whole patches; None: the size at which the network
    serves whole images."""
    group: str = "group"
    """Column that names groups of near-duplicates, of a set that is not Copydays."""

    def __post_init__(self) -> None:
        check_words(self)

    def view_px(self, runtime: Runtime) -> int:
        """Side of the view for this network."""
        whole_px, step = runtime.manifest.preprocess.whole_px, step_px(runtime.manifest)
        wanted = whole_px if self.size_px is None else self.size_px
        if wanted < step:
            raise InputError(f"--size-px {wanted}: smaller than one patch of {step} pixels")
        return wanted // step * step


def describe(table: FeatureTable) -> np.ndarray:
    """Descriptors [n, 2 D]: CLS, then the patches' generalised mean; [n, D] for a network without patches."""
    if "patch_gem" not in table.columns:
        return table.features
    return np.concatenate([table.features, table.columns["patch_gem"]], axis=1)


@dataclass(frozen=True)
class Whitening:
    """Subtract a mean, rotate into principal components, divide by the power of their eigenvalues."""

    mean_D: np.ndarray
    matrix_DD: np.ndarray

    def apply(self, features_nD: np.ndarray) -> np.ndarray:
        """Whitened features [n, D]."""
        whitened: np.ndarray = ((features_nD - self.mean_D) @ self.matrix_DD.T).astype(np.float32)
        return whitened


def learn_whitening(features_mD: np.ndarray) -> Whitening:
    """From features of other images. Second moments are not centred, as in the published script; the mean is taken off later."""
    features = features_mD.astype(np.float64)
    values_D, vectors_DD = np.linalg.eigh(features.T @ features / len(features))
    values_D = np.maximum(values_D, values_D.max() * WHITENING_FLOOR)
    order = np.argsort(values_D)[::-1]
    scale_D = values_D[order] ** -WHITENING_POWER
    return Whitening(features.mean(axis=0), scale_D[:, None] * vectors_DD[:, order].T)


def evaluate_pairs(
    table: FeatureTable,
    groups_n: Sequence[str],
    spec: CopiesSpec = CopiesSpec(),
    whitening: Whitening | None = None,
) -> Measurement:
    """Average precision over all pairs of images; a pair of one group is a hit. Raises InputError without such a pair."""
    check_tables(table)
    check_length("groups", groups_n, table)
    n = len(table)
    if n > MAX_PAIRED_IMAGES:
        raise InputError(f"{n} images have {n * (n - 1) // 2:,} pairs; wanted at most {MAX_PAIRED_IMAGES} images")
    group_n = np.unique(np.asarray(groups_n), return_inverse=True)[1]
    features_nD = describe(table)
    bank_nD = unit_rows(features_nD if whitening is None else whitening.apply(features_nD))
    similarity_nn = (bank_nD @ bank_nD.T).numpy()
    grouped = np.flatnonzero(np.bincount(group_n)[group_n] > 1)
    if not len(grouped):
        raise InputError(f"no two of the {n} images share a group; is --group {spec.group} the right column?")
    ranked = zip(*_rankings(similarity_nn, group_n, grouped), strict=True)
    precision, neighbours, relevant = (np.concatenate(parts) for parts in ranked)
    drawn_q, notes = drawn_groups(group_n[grouped])
    pairs = RankedPairs.of(similarity_nn, group_n)
    return Measurement(
        evaluator="copies",
        protocol="average precision of pairs of one group among all pairs of images, cosine of CLS ++ GeM patches"
        + (", whitened" if whitening is not None else ""),
        version=VERSION,
        metrics={
            "ap": Metric(pairs.precision(), pairs.interval95(), len(pairs.first_P)),
            "map": mean_metric(precision, drawn_q),
            "top1": mean_metric(relevant[:, 0], drawn_q),
        },
        headline="ap",
        selected_on="nothing",
        chosen={},
        grid=[],
        settings=asdict(spec),
        notes=notes,
        predictions={
            "names": np.array(table.names)[grouped],
            "score": precision,
            "groups": drawn_q,
            "neighbours": neighbours,
            "database": np.array(table.names),
            "relevant": relevant,
        },
    )


def _rankings(
    similarity_nn: np.ndarray, group_n: np.ndarray, queries_q: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For some queries at a time average precision, the first `SEARCHED` rows, and which of these are of their group."""
    for start in range(0, len(queries_q), QUERIES_AT_ONCE):
        rows = queries_q[start : start + QUERIES_AT_ONCE]
        similarity = similarity_nn[rows]
        similarity[np.arange(len(rows)), rows] = -np.inf  # the image itself comes last
        ranking = np.argsort(-similarity, axis=1, kind="stable")[:, :-1]
        relevant = group_n[ranking] == group_n[rows, None]
        yield average_precisions(relevant), ranking[:, :SEARCHED], relevant[:, :SEARCHED]


def evaluate_copydays(
    originals: FeatureTable,
    blocks: Mapping[str, FeatureTable],
    spec: CopiesSpec = CopiesSpec(),
    whitening: Whitening | None = None,
    distractors: FeatureTable | None = None,
) -> Measurement:
    """Each block of altered images searches the originals (and distractors). Raises InputError for an empty match."""
    tables = [originals, *blocks.values(), *([distractors] if distractors is not None else [])]
    check_tables(*tables)
    described = [describe(table) if whitening is None else whitening.apply(describe(table)) for table in tables]
    extra = described[len(blocks) + 1 :]
    bank_nD = unit_rows(np.concatenate([described[0], *extra]))
    keys_n = np.array([Path(name).name[:PREFIX] for name in originals.names] + [""] * sum(map(len, extra)))
    metrics: dict[str, Metric] = {}
    found: dict[str, np.ndarray] = {}
    rankings: dict[str, np.ndarray] = {}
    drawn: dict[str, np.ndarray] = {}
    notes: list[str] = []
    for (block, table), queries_qD in zip(blocks.items(), described[1:], strict=False):
        ranking = np.concatenate([rows.numpy() for _, rows in nearest(bank_nD, queries_qD, SEARCHED)])
        rankings[block], precisions = ranking, []
        for name, row in zip(table.names, ranking, strict=True):
            key = Path(name).name[:PREFIX]
            n_positive = int((keys_n == key).sum())
            if not n_positive:
                raise InputError(f"{name}: no original shares its first {PREFIX} characters; is this Copydays?")
            precisions.append(trapezoid_precision(np.flatnonzero(keys_n[row] == key), n_positive))
        found[block] = np.array(precisions)
        drawn[block], too_few = drawn_groups([Path(name).name[:PREFIX] for name in table.names])
        metrics[f"map_{block}"] = mean_metric(found[block], drawn[block])
        notes += [f"{block}: {note}" for note in too_few]
    headline = "map_strong" if "strong" in blocks else next(iter(metrics))
    block = headline.removeprefix("map_")
    keys_q = np.array([Path(name).name[:PREFIX] for name in blocks[block].names])
    return Measurement(
        evaluator="copies",
        protocol=f"Copydays, first {SEARCHED} results, CLS ++ GeM patches{', whitened' if whitening else ''}, "
        f"{len(distractors) if distractors is not None else 0} distractors",
        version=VERSION,
        metrics=metrics,
        headline=headline,
        selected_on="nothing",
        chosen={},
        grid=[{"block": name.removeprefix("map_"), "map": metric.value} for name, metric in metrics.items()],
        settings=asdict(spec) | {"whitened": whitening is not None, "distractors": sum(map(len, extra))},
        notes=notes,
        predictions={
            "names": np.array(blocks[block].names),
            "score": found[block],
            "groups": drawn[block],
            "neighbours": rankings[block],
            "database": np.array([*originals.names, *(distractors.names if distractors is not None else ())]),
            "relevant": keys_n[rankings[block]] == keys_q[:, None],
        },
    )


@dataclass(frozen=True, kw_only=True)
class CopiesRun(RunOptions):
    """Options of the copy detection evaluator."""

    data: str
    """Copydays as distributed (a folder with original/ and strong/, jpegqual/ or crops/; also copydays:ROOT), or any set
    whose table has a column `group`."""
    whiten_data: str | None = None
    """Other images, from which a whitening of the descriptors is learned (published: 20,000 of YFCC)."""
    distractors: str | None = None
    """Copydays: further images that are searched beside the originals (published: 10,000 of YFCC)."""
    baselines: tuple[Literal["pixels", "hog", "untrained"], ...] = ()
    """Measured beside the network on the same images: pixels (32 x 32 RGB), hog (histograms of oriented gradients),
    untrained (same network, random weights)."""


def copydays_at(data: str) -> Path | None:
    """The folder of Copydays that `data` names, or None. Raises InputError where it is named but not there."""
    root = Path(data.removeprefix("copydays:"))
    if (root / "original").is_dir() and any((root / block).is_dir() for block in ("strong", "jpegqual", "crops")):
        return root
    if data.startswith("copydays:"):
        raise InputError(f"{data}: wanted original/ and strong/, jpegqual/ or crops/ in {root}")
    return None


def open_copydays(root: Path) -> dict[str, Dataset]:
    """`original`, then each block of altered images: `strong`, `jpegqual_75`, ..., `crops_10`, ... Raises InputError."""
    folders = {"original": root / "original"}
    if (root / "strong").is_dir():
        folders["strong"] = root / "strong"
    for kind in ("jpegqual", "crops"):
        if (root / kind).is_dir():
            levels = sorted(
                (one for one in (root / kind).iterdir() if one.name.isdigit()), key=lambda one: int(one.name)
            )
            folders |= {f"{kind}_{level.name}": level for level in levels if level.is_dir()}
    found = {}
    for name, folder in folders.items():
        records = [Record(Item(path.name), {IMAGE: Member(str(path))}) for path in images_under(folder)]
        if not records:
            raise InputError(f"{folder}: no images in it")
        found[name] = Dataset(records, name=str(folder))
    return found


def run(options: CopiesRun, spec: CopiesSpec = CopiesSpec()) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result, written where asked."""
    root = copydays_at(options.data)
    datasets = {"val": open_dataset(options.data)} if root is None else open_copydays(root)
    how = "all images" if root is None else "Copydays as distributed"
    if root is None:
        items = datasets["val"].items
        if any(spec.group not in item.row for item in items):
            raise InputError(
                f"{options.data}: no column {spec.group!r}; wanted a table that names groups of near-duplicates "
                "(see --group), or Copydays with original/ and strong/"
            )
    extras = {"distractors": options.distractors, "whitening": options.whiten_data}
    n_main = len(datasets)
    datasets |= {name: open_dataset(data) for name, data in extras.items() if data is not None}

    def measured(tables: list[FeatureTable]) -> Measurement:
        more = dict(zip(list(datasets)[n_main:], tables[n_main:], strict=True))
        whitening = learn_whitening(describe(more["whitening"])) if "whitening" in more else None
        if root is None:
            groups = [items[row].row[spec.group] or items[row].name for row in tables[0].rows]
            return evaluate_pairs(tables[0], groups, spec, whitening)
        blocks = dict(zip(list(datasets)[1:n_main], tables[1:n_main], strict=True))
        return evaluate_copydays(tables[0], blocks, spec, whitening, more.get("distractors"))

    def extraction(runtime: Runtime) -> ExtractSpec:
        pooled = "patches" in runtime.outputs
        view = ViewSpec(view="whole", size_px=spec.view_px(runtime))
        return ExtractSpec(columns=("embedding", "patch_gem") if pooled else ("embedding",), view=view)

    return evaluate_parts(
        options,
        Parts(datasets=datasets, how=how, group_column=spec.group if root is None else None),
        measured,
        extraction,
        options.baselines,
    )[0]


def main(
    options: Annotated[CopiesRun, tyro.conf.arg(name="")],
    spec: Annotated[CopiesSpec, tyro.conf.arg(name="")],
) -> None:
    """Copy detection with the features of a frozen network."""
    print_result(run(options, spec), options.out)


if __name__ == "__main__":
    run_cli(lambda: evaluator_cli(main))
