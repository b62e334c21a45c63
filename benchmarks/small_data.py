"""Does the rule for little data help? `python -m benchmarks.small_data --data SETS --eval-data SET SET --out FOLDER`.

Trains one small recipe's method several times for the same few steps: with the rule's values, and with one of them moved: to the published
value, to half, to double. The network is a tenth of the recipe's, so that a busy core does a run in minutes. Prints k-NN top-1 of each, the
mean over the labelled sets, beside the untrained network's, and the difference to the rule under the same seed with its standard error
over the seeds. Rows that exist in FOLDER/results.jsonl are not run again.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro

from backbones.checkpoints import Manifest, load_backbone
from backbones.vit import ViTSpec
from data.datasets import Dataset, open_dataset
from data.errors import run_cli
from data.preprocess import Preprocess
from training.loop import train
from training.memory import keep_freed_memory
from training.methods import make_state
from training.probe import KnnProbe
from training.recipe import Recipe
from training.small import fit_to_data


def tiny(recipe: Recipe) -> Recipe:
    """The same method and rule on a network of four blocks of width 64 and views of 48 and 24 px."""
    assert isinstance(recipe.backbone, ViTSpec)
    return replace(
        recipe,
        backbone=replace(recipe.backbone, patch_px=8, width=64, depth=4, heads=2, img_px=48),
        crops=replace(recipe.crops, global_px=48, local_px=24, n_local=4),
        head=replace(recipe.head, hidden=256, bottleneck=64),
        preprocess=Preprocess(size_px=64, resize_px=64, whole_px=64),
    )


def moved(**fields: Any) -> Callable[[Recipe], Recipe]:
    """A change of the optimiser's fields."""
    return lambda recipe: replace(recipe, optim=replace(recipe.optim, **fields))


def prototypes(factor: float) -> Callable[[Recipe], Recipe]:
    """A change of the number of prototypes."""
    return lambda recipe: replace(recipe, head=replace(recipe.head, prototypes=round(recipe.head.prototypes * factor)))


def lr(factor: float) -> Callable[[Recipe], Recipe]:
    """A change of the learning rate."""
    return lambda recipe: replace(recipe, optim=replace(recipe.optim, lr=recipe.optim.lr * factor))


def published(recipe: Recipe) -> Recipe:
    """What the published configurations of both methods share, at once."""
    linear: dict[str, Any] = {"lr": 5e-4, "lr_batch": 256, "lr_rule": "linear"}
    return replace(
        recipe,
        head=replace(recipe.head, prototypes=65_536),
        optim=replace(recipe.optim, momentum=(0.996, 1.0), teacher_temperature=(0.04, 0.07), **linear),
    )


def temperature(factor: float) -> Callable[[Recipe], Recipe]:
    """A change of the teacher's temperature, at both ends."""

    def change(recipe: Recipe) -> Recipe:
        first, last = recipe.optim.teacher_temperature
        return moved(teacher_temperature=(first * factor, last * factor))(recipe)

    return change


VARIANTS: dict[str, Callable[[Recipe], Recipe]] = {
    "rule": lambda recipe: recipe,
    "published": published,
    "temperature published (0.04 to 0.07)": moved(teacher_temperature=(0.04, 0.07)),
    "temperature half": temperature(0.5),
    "momentum published (0.996)": moved(momentum=(0.996, 1.0)),
    "learning rate half": lr(0.5),
    "learning rate double": lr(2.0),
    "prototypes fourfold": prototypes(4.0),
}


def main(
    data: str,
    eval_data: tuple[str, ...],
    out: Path,
    recipe: str = "dinov2_small_cpu",
    steps: int = 400,
    images: int = 2000,
    seeds: int = 1,
    only: tuple[str, ...] = (),
) -> None:
    """Train and measure every variant.

    Args:
        data: Images to train on, as for `python -m training`; the first `images` of them by a fixed shuffle.
        eval_data: Labelled sets.
        out: Folder for results.jsonl and the runs.
        recipe: Small recipe.
        steps: Of each run.
        images: Of the training set.
        seeds: Runs a variant.
        only: Variants to run, instead of all.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    whole = open_dataset(data, "train")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = whole.subset(sorted(order[:images]))
    batch = fit_to_data(recipe, len(dataset)).batch_size
    base = tiny(fit_to_data(recipe, len(dataset), batch, max(round(steps * batch / len(dataset)), 1)))
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    for seed in range(seeds):
        for name, change in VARIANTS.items():
            known = any((row["variant"], row["seed"], row["recipe"]) == (name, seed, recipe) for row in done)
            if known or (only and name not in only):
                continue
            row = measure(change(base), dataset, eval_data, out / f"{recipe}-{name}-{seed}".replace(" ", "-"), seed)
            done.append({"recipe": recipe, "variant": name, "seed": seed, **row})
            with results.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    show([row for row in done if row["recipe"] == recipe])


def measure(recipe: Recipe, dataset: Dataset, eval_data: Sequence[str], folder: Path, seed: int) -> dict[str, Any]:
    """k-NN of one run on each set, their mean, and that of its network before."""
    began, probes = time.process_time(), [KnnProbe(one, 1) for one in eval_data]
    torch.manual_seed(seed)
    untrained = make_state(recipe, torch.device("cpu")).teacher.backbone
    manifest = Manifest(architecture={}, preprocess=recipe.preprocess)
    train(recipe, dataset, folder, recipe_name="small", source="", revision="", seed=seed, workers=0)
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    trained = load_backbone(folder / "checkpoints" / "latest.safetensors").model
    before, after = ([probe.top1(one, manifest, "cpu") for probe in probes] for one in (untrained, trained))  # type: ignore[arg-type]
    return {
        "knn_top1": statistics.mean(after),
        "knn_top1_of_sets": after,
        "untrained": statistics.mean(before),
        "target_entropy_nats": last["target_entropy_nats"],
        "effective_rank": last["effective_rank"],
        "cpu_s": time.process_time() - began,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """A table of means over the seeds, and of the differences to the rule under the same seed."""
    of = {(row["variant"], row["seed"]): row for row in rows}
    print(f"{'variant':40} {'seeds':>5} {'k-NN':>6} {'- rule':>7} {'error':>6} {'entropy':>8} {'rank':>6}")
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        mean = {
            key: statistics.mean(row[key] for row in mine)
            for key in ("knn_top1", "target_entropy_nats", "effective_rank")
        }
        gaps = [row["knn_top1"] - of["rule", row["seed"]]["knn_top1"] for row in mine if ("rule", row["seed"]) in of]
        gap = 100 * statistics.mean(gaps) if gaps else float("nan")
        error = 100 * statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        print(
            f"{name:40} {len(mine):5d} {100 * mean['knn_top1']:6.1f} {gap:+7.1f} {error:6.1f} {mean['target_entropy_nats']:8.2f} "
            f"{mean['effective_rank']:6.1f}"
        )
    print(f"{'untrained':40} {'':5} {100 * statistics.mean(row['untrained'] for row in rows):6.1f}")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m benchmarks.small_data", description=__doc__))
