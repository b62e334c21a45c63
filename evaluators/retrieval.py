"""Features in, how well an image finds its like: mean average precision over queries.

On the benchmarks Revisited Oxford and Paris, a query searches a database whose images are easy, hard or junk for it. On
any other set, every image searches all the others, and those that share its value in a column (the same instance, the
same concept, the same class) are what it should find; --across leaves it only images that differ in another column.
Read in this order: RetrievalSpec, evaluate, evaluate_landmarks, run.
Legend: n images, q queries, D feature size.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from data.datasets import open_dataset
from data.errors import InputError, run_cli
from evaluators.accuracy import mean_metric
from evaluators.bootstrap import drawn_groups
from evaluators.classification import RunOptions, check_length, check_tables, print_result
from evaluators.extract import ExtractSpec, FeatureTable
from evaluators.landmarks import Landmarks, landmarks_at, open_landmarks
from evaluators.measuring import Parts, evaluate_parts
from evaluators.neighbours import similarity_chunks, top_rows, unit_rows
from evaluators.presets import check_words, evaluator_cli
from evaluators.ranking import REVISITED_SETTINGS, average_precisions, revisited_figures
from evaluators.results import Measurement
from evaluators.splits import GROUP_COLUMNS, VAL_NAMES, pick_group_column
from evaluators.view_batches import ViewSpec
from runtimes.runtime import Runtime

VERSION = 1
SHOWN = 10
"""Neighbours kept in the predictions, for pictures."""
THREE_SCALES = (1.0, 2**-0.5, 0.5)
"""Of DINO's evaluation on Revisited Paris."""


@dataclass(frozen=True, kw_only=True)
class RetrievalSpec:
    """The retrieval protocol."""

    preset: Literal["dino", "dinov2"] | None = None
    """How benchmark images are shown. dino, as published: queries not cropped, Oxford at 224 px and one scale, Paris at
    512 px and three. dinov2: queries cropped to their box, 518 px, three scales. Left out: as dinov2, at 512 px. Other
    sets are shown in centre views, whatever the preset."""
    by: str = "auto"
    """Column whose equal values make two images alike; `auto`: instance, family, concept or group, else the label."""
    across: str | None = None
    """Column in which an image and what it may find differ, such as `vendor`."""
    scales: tuple[float, ...] | None = None
    """Sizes at which a benchmark image is shown, its features averaged; left out: the preset's."""
    size_px: int | None = None
    """Longest side of benchmark images; left out: the preset's."""

    def __post_init__(self) -> None:
        check_words(self)

    def for_benchmark(self, name: str) -> tuple[int, tuple[float, ...], bool]:
        """Longest side, scales, and whether queries are cropped, for `roxford5k` or `rparis6k`."""
        if self.preset == "dino":
            size, scales = (224, (1.0,)) if name == "roxford5k" else (512, THREE_SCALES)
        else:
            size, scales = 518 if self.preset == "dinov2" else 512, THREE_SCALES
        return self.size_px or size, self.scales or scales, self.preset != "dino"


def evaluate(
    table: FeatureTable,
    keys_n: Sequence[str],
    sides_n: Sequence[str] | None = None,
    spec: RetrievalSpec = RetrievalSpec(),
) -> Measurement:
    """Every image searches the others; those with its key are relevant. `sides_n`: an image finds only other sides.

    Images that have nothing to find are no queries. Raises InputError where none has.
    """
    check_tables(table)
    check_length("keys", keys_n, table)
    check_length("sides", keys_n if sides_n is None else sides_n, table)
    keys = np.unique(np.asarray(keys_n), return_inverse=True)[1]
    if not keys.any():
        raise InputError(
            f"all {len(table)} images share one value, so that any order is right; is --by the right column?"
        )
    sides = None if sides_n is None else np.unique(np.asarray(sides_n), return_inverse=True)[1]
    bank_nD, n = unit_rows(table.features), len(table)
    figures: dict[str, list[np.ndarray]] = {"map": [], "top1": [], "p5": [], "p10": []}
    shown: list[np.ndarray] = []
    for start, similarity_cn in similarity_chunks(bank_nD, table.features):
        rows_c = np.arange(start, start + len(similarity_cn))
        barred_cn = rows_c[:, None] == np.arange(n) if sides is None else sides[rows_c, None] == sides
        similarity_cn.masked_fill_(torch.from_numpy(barred_cn), -torch.inf)
        ranking_cn = top_rows(similarity_cn, n)[1].numpy()
        relevant_cn = (keys[ranking_cn] == keys[rows_c, None]) & ~np.take_along_axis(barred_cn, ranking_cn, axis=1)
        figures["map"].append(average_precisions(relevant_cn))
        figures["top1"].append(relevant_cn[:, 0].astype(float))
        for k in (5, 10):
            figures[f"p{k}"].append(
                relevant_cn[:, :k].sum(axis=1) / np.minimum(k, np.maximum(relevant_cn.sum(axis=1), 1))
            )
        shown.append(ranking_cn[:, :SHOWN])
    columns = {name: np.concatenate(parts) for name, parts in figures.items()}
    asked = np.flatnonzero(~np.isnan(columns["map"]))
    if not len(asked):
        raise InputError(f"none of the {n} images shares its value with another; is --by the right column?")
    groups_q, notes = drawn_groups(np.array(table.groups)[asked])
    notes += [f"{n - len(asked)} images have nothing to find and are no queries"] if len(asked) < n else []
    return Measurement(
        evaluator="retrieval",
        protocol="every image searches the others by cosine similarity; mean average precision over queries"
        + (f", only images of another {spec.across} are found" if sides is not None else ""),
        version=VERSION,
        metrics={name: mean_metric(values[asked], groups_q) for name, values in columns.items()},
        headline="map",
        selected_on="nothing",
        chosen={},
        grid=[],
        settings=asdict(spec),
        notes=notes,
        predictions={
            "names": np.array(table.names)[asked],
            "score": columns["map"][asked],
            "groups": groups_q,
            "neighbours": np.concatenate(shown)[asked],
            "database": np.array(table.names),
            "relevant": keys[np.concatenate(shown)[asked]] == keys[asked, None],
        },
    )


def evaluate_landmarks(
    database: FeatureTable, queries: FeatureTable, truth: Landmarks, spec: RetrievalSpec = RetrievalSpec()
) -> Measurement:
    """Revisited Oxford or Paris: the queries search the database. Raises InputError where no query has a positive."""
    check_tables(database, queries)
    bank_nD = unit_rows(database.features)
    position = np.full(len(truth.names), -1)
    position[np.array(database.rows)] = np.arange(len(database))
    per_query: list[dict[str, float]] = []
    shown: list[np.ndarray] = []
    relevant: list[np.ndarray] = []
    for start, similarity_cn in similarity_chunks(bank_nD, queries.features):
        for at, ranking_n in enumerate(top_rows(similarity_cn, len(database))[1].numpy()):
            marks = {
                kind: [int(position[row]) for row in rows]
                for kind, rows in truth.truth[queries.rows[start + at]].items()
            }
            figures: dict[str, float] = {}
            for setting in REVISITED_SETTINGS:
                found = revisited_figures(ranking_n, marks, setting) or {}
                figures |= {f"{name}_{setting}": value for name, value in found.items()}
            per_query.append(figures)
            shown.append(_beside_junk(ranking_n, marks["junk"]))
            relevant.append(np.isin(shown[-1], [*marks["easy"], *marks["hard"]]))
    names = sorted({name for figures in per_query for name in figures})
    if "map_medium" not in names:
        raise InputError("no query has a positive in the ground truth; is it the one of this benchmark?")
    columns = {name: np.array([figures.get(name, np.nan) for figures in per_query]) for name in names}
    size_px, scales, cropped = spec.for_benchmark(truth.benchmark)
    return Measurement(
        evaluator="retrieval",
        protocol=f"{truth.benchmark}, longest side {size_px} px, {len(scales)} scale(s), queries "
        f"{'cropped to their box' if cropped else 'not cropped'}; easy, medium and hard as revisited",
        version=VERSION,
        metrics={name: mean_metric(values[~np.isnan(values)]) for name, values in columns.items()},
        headline="map_medium",
        selected_on="nothing",
        chosen={},
        grid=[],
        settings=asdict(spec) | {"size_px": size_px, "scales": list(scales), "queries_cropped": cropped},
        predictions={
            "names": np.array(queries.names),
            "score": np.nan_to_num(columns["map_medium"]),
            "groups": np.arange(len(queries)),
            "neighbours": np.array(shown),
            "database": np.array(database.names),
            "relevant": np.array(relevant),
            **{name: values for name, values in columns.items() if name.startswith("map")},
        },
    )


def _beside_junk(ranking_n: np.ndarray, junk: Sequence[int]) -> np.ndarray:
    """The first `SHOWN` rows that count, -1 where there are no more: junk is passed over, as in scoring."""
    kept = ranking_n[~np.isin(ranking_n, junk)][:SHOWN]
    return np.pad(kept, (0, SHOWN - len(kept)), constant_values=-1)


@dataclass(frozen=True, kw_only=True)
class RetrievalRun(RunOptions):
    """Options of the retrieval evaluator."""

    data: str
    """The images: any labelled set, or a benchmark as distributed: roxford5k:ROOT, rparis6k:ROOT, or the folder with
    its gnd_*.pkl and jpg/."""
    split: str | None = None
    """Images that are compared; left out: `val`, or `test`, or all of a set that names no splits; `all`."""
    baselines: tuple[Literal["pixels", "hog", "untrained"], ...] = ()
    """Measured beside the network on the same images: pixels (32 x 32 RGB), hog (histograms of oriented gradients),
    untrained (same network, random weights)."""


def open_compared(data: str, split: str | None, by: str) -> tuple[Parts, str]:
    """The images that search each other, and the column by which they are alike. Raises InputError."""
    dataset = open_dataset(data)
    names = {item.split for item in dataset.items}
    wanted = split or next((name for name in VAL_NAMES if name in names), "all")
    how = "all images"
    if wanted != "all":
        dataset, how = open_dataset(data, wanted), f"split {wanted!r} of the set"
    columns = list(dataset.items[0].row) if dataset.items else []
    labelled = any(item.label for item in dataset.items)
    column = next((name for name in GROUP_COLUMNS if name in columns), "label") if by == "auto" else by
    if column not in columns and not (column == "label" and labelled):
        raise InputError(
            f"--by {by}: {data} has no column {column!r}; wanted class folders or one of: "
            f"{', '.join(columns) or 'none (it has no table)'}"
        )
    tied = pick_group_column(dataset.items, "auto", data)
    return Parts(datasets={"val": dataset}, how=how, group_column=tied), column


def run(options: RetrievalRun, spec: RetrievalSpec = RetrievalSpec()) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result, written where asked."""
    if (benchmark := landmarks_at(options.data)) is not None:
        size_px, scales, cropped = spec.for_benchmark(benchmark.name)
        truth, database, queries = open_landmarks(benchmark, cropped)
        parts = Parts(datasets={"database": database, "queries": queries}, how=f"{benchmark.name} as distributed")
        view = ViewSpec(view="fit", size_px=size_px)
        extraction = ExtractSpec(columns=("embedding",), view=view, scales=scales)

        def searched(tables: list[FeatureTable]) -> Measurement:
            return evaluate_landmarks(tables[0], tables[1], truth, spec)

        return evaluate_parts(options, parts, searched, lambda _: extraction, options.baselines)[0]
    parts, column = open_compared(options.data, options.split, spec.by)
    items = parts.datasets["val"].items
    if spec.across is not None and any(spec.across not in item.row for item in items):
        raise InputError(f"--across {spec.across}: {options.data} has no such column")

    def measured(tables: list[FeatureTable]) -> Measurement:
        (table,) = tables
        kept = [items[row] for row in table.rows]
        keys = [(item.label if column == "label" else item.row.get(column)) or item.name for item in kept]
        sides = None if spec.across is None else [item.row[spec.across] for item in kept]
        return evaluate(table, keys, sides, spec)

    parts.notes.append(f"alike is what shares `{column}`")
    return evaluate_parts(options, parts, measured, center_features, options.baselines)[0]


def center_features(_: Runtime) -> ExtractSpec:
    """The features that k-NN reads too, so that they are extracted once."""
    return ExtractSpec()


def main(
    options: Annotated[RetrievalRun, tyro.conf.arg(name="")],
    spec: Annotated[RetrievalSpec, tyro.conf.arg(name="")],
) -> None:
    """Retrieval with the features of a frozen network."""
    print_result(run(options, spec), options.out)


if __name__ == "__main__":
    run_cli(lambda: evaluator_cli(main))
