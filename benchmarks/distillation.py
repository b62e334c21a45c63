"""Does a small student gain by a teacher's features? `python -m benchmarks.distillation --data SETS --eval-data SETS --out FOLDER`.

One network of half the teacher's width, from the same random weights, trained for as many passes over the same images: by feature
distillation from the teacher, and by itself (DINOv1, the small recipe's rule). Prints k-NN top-1 of both beside the teacher's and the
untrained network's, with 95 % intervals of the student's. A run that was stopped is resumed; a finished one is only measured.
"""

import copy
import time
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from torch import nn

from backbones.checkpoints import Backbone, Manifest, load_backbone
from backbones.vit import ViTSpec
from data.datasets import open_dataset
from data.errors import run_cli
from evaluators.extract import ExtractSpec, extract
from evaluators.knn import evaluate
from evaluators.results import Metric
from evaluators.splits import open_splits
from runtimes.torch_runtime import TorchRuntime
from training.loop import train
from training.memory import keep_freed_memory
from training.methods import make_state
from training.recipe import Recipe
from training.small import fit_to_data


def half_width(recipe: Recipe) -> Recipe:
    """The recipe on a network of half the width, with heads that fit."""
    assert isinstance(recipe.backbone, ViTSpec)
    backbone = replace(recipe.backbone, width=recipe.backbone.width // 2, heads=max(recipe.backbone.heads // 2, 1))
    return replace(recipe, backbone=backbone, head=replace(recipe.head, hidden=recipe.head.hidden // 2))


def knn(backbone: nn.Module, manifest: Manifest, data: str) -> Metric:
    """Weighted k-NN top-1 on a labelled set."""
    splits = open_splits(data)
    spec = ExtractSpec(columns=("embedding",), group_column=splits.group_column)
    runtime = TorchRuntime(Backbone(copy.deepcopy(backbone), manifest), device="cpu")
    tables = [extract(runtime, part, spec) for part in (splits.train, splits.val)]
    return evaluate(tables[0], tables[1]).metrics["top1"]


def main(
    data: str,
    eval_data: tuple[str, ...],
    out: Path,
    teacher: str = "models/dinoscope_tiny.safetensors",
    recipe: str = "dino_small_cpu",
    epochs: int = 10,
    seed: int = 0,
) -> None:
    """Train both and measure.

    Args:
        data: Images to train on, as for `python -m training`; of those with splits, the train rows.
        eval_data: Labelled sets.
        out: Folder for the runs.
        teacher: Backbone whose features are learned.
        recipe: Small recipe, of which the students are half as wide.
        epochs: Passes over the images, of each run.
        seed: Of weights, order and views.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    dataset = open_dataset(data, "train")
    student = half_width(fit_to_data(recipe, len(dataset), epochs=epochs))
    torch.manual_seed(seed)
    untrained = make_state(student, torch.device("cpu")).teacher.backbone
    found = load_backbone(teacher)
    rows: dict[str, tuple[nn.Module, Manifest]] = {
        "teacher": (found.model, found.manifest),
        "untrained": (untrained, Manifest(architecture={}, preprocess=student.preprocess)),
    }
    for name, guide in (("distilled", teacher), ("by itself", None)):
        began = time.process_time()
        folder = out / name.replace(" ", "-")
        train(
            student, dataset, folder, recipe_name=recipe, source=data, revision="", seed=seed, teacher=guide, workers=0
        )
        print(f"{name}: {(time.process_time() - began) / 60:.1f} CPU minutes")
        trained = load_backbone(folder / "checkpoints" / "latest.safetensors")
        rows[name] = (trained.model, trained.manifest)
    print(f"{'k-NN top-1, %':24}" + "".join(f"{Path(one).stem:>26}" for one in eval_data))
    for name, (backbone, manifest) in rows.items():
        cells = ""
        for one in eval_data:
            top1 = knn(backbone, manifest, one)
            low, high = top1.ci95 or (0.0, 1.0)
            cells += f"{f'{100 * top1.value:.1f} ({100 * low:.1f} to {100 * high:.1f})':>26}"
        print(f"{name:24}{cells}")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m benchmarks.distillation", description=__doc__))
