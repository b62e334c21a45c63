"""Train a backbone: `python -m training --recipe R --data D --out RUN`."""

import dataclasses
import subprocess
from pathlib import Path

import torch
import tyro

from data.datasets import open_dataset
from data.errors import InputError, run_cli
from training.loop import train
from training.recipe import Recipe
from training.recipes import find_recipe


def main(
    recipe: str,
    data: str,
    out: Path,
    split: str | None = None,
    init: str | None = None,
    teacher: str | None = None,
    eval_data: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    workers: int = 1,
    threads: int | None = None,
    device: str = "auto",
) -> None:
    """Train a backbone by self-distillation, without labels.

    Run the same command again to resume. Ctrl-C and SIGTERM save first.

    Args:
        recipe: Name of a recipe: dino_tiny_small_data for a CPU, smoke, smoke_dinov2 to try; training/published.py has the published ones.
        data: Folder, CSV, tar shards or packed set; several joined by commas.
        out: Run folder to make or to resume.
        split: Use only the rows of this split, such as train.
        init: Begin with these weights instead of random ones: a run folder (with its heads) or a backbone as `--ckpt` takes it.
        teacher: Distil the frozen teacher of this finished DINOv2 run, usually of a larger backbone, with its heads.
        eval_data: Labelled images, on which k-NN measures the teacher after each epoch; labels are used for nothing else.
        epochs: Instead of the recipe's.
        batch_size: Images a step, instead of the recipe's; the learning rate follows.
        seed: Of initialisation, order and views.
        workers: Processes that decode and cut views; 0 does it in this one.
        threads: Threads of torch; all cores if not given.
        device: auto, cpu, or cuda.
    """
    chosen = find_recipe(recipe)
    if epochs is not None:
        chosen = dataclasses.replace(chosen, epochs=epochs)
    if batch_size is not None:
        chosen = dataclasses.replace(chosen, batch_size=batch_size)
    set_threads(threads)
    print(start(chosen, recipe, data, out, split, seed, workers, pick_device(device), init, teacher, eval_data))


def start(
    recipe: Recipe,
    name: str,
    data: str,
    out: Path,
    split: str | None,
    seed: int,
    workers: int,
    device: torch.device,
    init: str | None,
    teacher: str | None = None,
    eval_data: str | None = None,
) -> Path:
    """Open the data and train; returns the checkpoint's path. For commands."""
    return train(
        recipe,
        open_dataset(data, split),
        out,
        recipe_name=name,
        source=data,
        revision=source_revision(),
        seed=seed,
        workers=workers,
        device=device,
        init=init,
        teacher=teacher,
        eval_data=eval_data,
    )


def set_threads(threads: int | None) -> None:
    """Bound torch's threads where a number is given. Raises InputError."""
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads {threads}: want at least 1")
    torch.set_num_threads(threads)


def pick_device(name: str) -> torch.device:
    """The device that a flag names. Raises InputError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r} is unknown; want auto, cpu or cuda")
    return torch.device(name)


def source_revision() -> str:
    """The commit this code was checked out from, or an empty string outside a checkout."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() if found.returncode == 0 else ""


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
