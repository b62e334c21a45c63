"""Does curation help? `python -m benchmarks.curation_example --data FOLDER --out FOLDER`.

Curates the unlabelled pool of FOLDER (the small sets as they are packed) by the commands of `curation`: duplicates and whatever is near an
evaluation image removed, then those retrieved that are like the labelled training images, then balanced. Trains one recipe from random
weights on the pool, on the curated part, and on as many images of the pool drawn at random, all for the same number of steps; measures each
on the real splits, and compares them with the pool's, image by image. Every part is kept: the same command goes on where it was.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from curation.balance import BalanceSpec, balance
from curation.command import CurationOptions
from curation.deduplicate import DeduplicateSpec, deduplicate
from curation.filters import FilterSpec
from curation.neighbours import SearchSpec
from curation.retrieve import RetrieveSpec, retrieve
from data.datasets import Dataset, open_dataset
from data.errors import run_cli
from evaluators import knn, linear, retrieval
from evaluators.classification import ClassificationRun
from evaluators.compare import compare, load_scored
from evaluators.picture_sheet import save_sheet
from evaluators.results import load_result, replacing
from training.loop import train
from training.memory import keep_freed_memory
from training.recipe import Recipe
from training.small import fit_to_data

LABELLED = ("photos", "clipart", "objects", "emoji", "stamps")
HELD_OUT = ("photos", "clipart", "objects", "emoji")
ALIKE = {"emoji": ("concept", "vendor"), "objects": ("instance", None)}
"""Sets that retrieval is measured on: the column that ties images together, and the one in which they must differ."""
PICTURES = 10


@dataclass(frozen=True, kw_only=True)
class Example:
    """What is curated, trained and measured."""

    data: Path
    """Folder of the packed sets: pool, photos, clipart, objects, emoji, stamps."""
    out: Path
    """Folder for the curated sets, runs, results, table.json, table.md and pictures.png; the same command goes on there."""
    ckpt: str = "models/dinoscope_tiny.safetensors"
    """Network that curates."""
    eval_threshold: float = 0.6
    """Cosine to an evaluation image at which a component falls; at the published 0.45 nine tenths of the pool fall with this network."""
    k: int = 2
    """Images retrieved a labelled image."""
    keep: int = 768
    """Images that balancing keeps."""
    epoch_steps: int = 101
    """Steps that the schedules count as an epoch: a pass over the pool in batches of 32."""
    epochs: int = 11
    arms: tuple[str, ...] = ("pool", "curated", "random")
    """What is trained and measured."""


def curated(example: Example) -> Path:
    """The curated part of the pool, as tar shards."""
    stages = example.out / "curated"

    def opened(names: Sequence[str], split: str | None) -> Dataset:
        return open_dataset(",".join(str(example.data / name) for name in names), split)

    def options(name: str, data: str | Path) -> CurationOptions:
        return CurationOptions(ckpt=example.ckpt, data=str(data), out=stages / name, threads=1)

    spec, filters, searching = DeduplicateSpec(eval_threshold=example.eval_threshold), FilterSpec(), SearchSpec()
    unique, alike, even = (stages / name / "shards" for name in ("unique", "alike", "even"))
    if not even.is_dir():
        pool, held, seeds = example.data / "pool", opened(HELD_OUT, None), opened(LABELLED, "train")
        deduplicate(open_dataset(pool), held, options("unique", pool), spec, filters, searching)
        retrieve(open_dataset(unique), seeds, options("alike", unique), RetrieveSpec(k=example.k), filters, searching)
        balance(open_dataset(alike), options("even", alike), BalanceSpec(keep=example.keep), filters)
    return even


def arm(name: str, example: Example) -> Dataset:
    """The images of one arm."""
    pool = open_dataset(example.data / "pool")
    if name == "pool":
        return pool
    if name == "curated":
        return open_dataset(curated(example))
    rows = np.random.default_rng(0).choice(len(pool), example.keep, replace=False)
    return pool.subset(sorted(rows.tolist()))


def recipe_of(example: Example) -> Recipe:
    """One recipe for all arms: the rule's for the whole pool, its epochs counted in steps."""
    n = len(open_dataset(example.data / "pool"))
    fitted = fit_to_data("dinov2_small_cpu", n, epochs=example.epochs)
    return replace(fitted, epoch_steps=example.epoch_steps)


def measured(ckpt: Path, example: Example, out: Path) -> list[str]:
    """Results of one network, as files in `out`; returns their names."""
    cache, names = example.out / "features", []
    for data in ("photos", "clipart", "objects"):
        for evaluator in (knn, linear):
            name = f"{evaluator.__name__.rpartition('.')[2]}-{data}.json"
            names.append(name)
            if not (out / name).is_file():
                evaluator.run(
                    ClassificationRun(
                        ckpt=str(ckpt),
                        data=str(example.data / data),
                        out=out / name,
                        threads=1,
                        cache_dir=cache,
                        baselines=("untrained",),
                    )
                )
    for data, (by, across) in ALIKE.items():
        name = f"retrieval-{data}.json"
        names.append(name)
        if not (out / name).is_file():
            retrieval.run(
                retrieval.RetrievalRun(
                    ckpt=str(ckpt),
                    data=str(example.data / data),
                    out=out / name,
                    threads=1,
                    cache_dir=cache,
                    baselines=("untrained",),
                ),
                retrieval.RetrievalSpec(by=by, across=across),
            )
    return names


def rows_of(example: Example, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row a result: the headline of each arm, and of each beside the pool's the paired difference."""
    rows = []
    for name in names:
        files = {one: example.out / "results" / one / name for one in example.arms}
        results = {one: load_result(file) for one, file in files.items()}
        first = results[example.arms[0]]
        headline = first["headline"]
        row: dict[str, Any] = {
            "result": name.removesuffix(".json"),
            "headline": headline,
            "n": first["metrics"][headline]["n"],
            "untrained": first["baselines"]["untrained"]["metrics"][headline]["value"],
            "arms": {one: result["metrics"][headline] for one, result in results.items()},
        }
        row["against the first"] = {
            one: compare(load_scored(files[example.arms[0]]), load_scored(file))["paired"]["score"]
            for one, file in list(files.items())[1:]
        }
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> str:
    """The rows in Markdown."""
    lines = [
        f"| measured | untrained | {' | '.join(arms)} | {' | '.join(f'{one} - {arms[0]} (95 %)' for one in arms[1:])} | test images |",
        "|---" * (3 + 2 * len(arms) - 1) + "|",
    ]
    for row in rows:
        values = [f"{row['arms'][one]['value']:.3f}" for one in arms]
        gaps = [
            f"{found['difference']:+.3f} ({found['ci95'][0]:+.3f} to {found['ci95'][1]:+.3f})"
            for found in row["against the first"].values()
        ]
        lines.append(
            f"| {row['result']}, {row['headline']} | {row['untrained']:.3f} | {' | '.join(values)} | {' | '.join(gaps)} | {row['n']} |"
        )
    return "\n".join(lines)


def main(example: Example) -> None:
    """Curate, train, measure, compare."""
    torch.set_num_threads(1)
    keep_freed_memory()
    recipe, pictures, sizes = recipe_of(example), [], {}
    names: list[str] = []
    example.out.mkdir(parents=True, exist_ok=True)
    for name in example.arms:
        dataset = arm(name, example)
        sizes[name] = len(dataset)
        pictures.append((f"{name}: {len(dataset)} images, some of them", dataset.examples(PICTURES)))
        save_sheet(example.out / "pictures.png", pictures)
        # a run that is done comes back at once
        ckpt = train(
            recipe,
            dataset,
            example.out / "runs" / name,
            recipe_name="dinov2_small_cpu",
            source="",
            revision="",
            workers=0,
        )
        names = measured(ckpt, example, example.out / "results" / name)
    rows = rows_of(example, names)
    found = {
        "steps": recipe.epochs * example.epoch_steps,
        "batch": recipe.batch_size,
        "images": sizes,
        "recipe": recipe.to_json(),
        "rows": rows,
    }
    with replacing(example.out / "table.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n")
    text = table(rows, example.arms)
    with replacing(example.out / "table.md") as path:
        path.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Example, prog="python -m benchmarks.curation_example", description=__doc__)))
