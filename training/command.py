"""What the commands of this room share: where the images lie, where the run goes, and what it runs on."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from data.datasets import Dataset
from data.errors import InputError
from data.loader import Maker
from data.streams import open_images
from training import parallel
from training.loop import Student, train
from training.memory import keep_freed_memory
from training.precision import Precision, slow_here
from training.probe import EvalEvery
from training.recipe import Recipe
from training.run_folder import RunFolder
from training.scale import Scale


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A run beside its recipe."""

    data: str
    """Folder, CSV, tar shards or packed set; several joined by commas."""
    out: Path
    """Run folder to make or to resume."""
    split: str | None = None
    """Use only the rows of this split, such as train."""
    eval_data: str | None = None
    """Labelled images, on which k-NN measures the teacher, and whose test images are drawn; labels are used for nothing else."""
    eval_every: Annotated[EvalEvery, tyro.conf.arg(name="")] = field(default_factory=EvalEvery)
    """How often."""
    seed: int = 0
    """Of initialisation, order and views."""
    workers: int = 1
    """Processes that decode and cut views; 0 does it in this one."""
    views: Maker = "workers"
    """Who makes the views: the workers, or the device, all of a batch together, from images that the workers only decode."""
    threads: int | None = None
    """Threads of torch; all cores if not given."""
    device: str = "auto"
    """auto, cpu, or cuda."""
    precision: Precision | None = None
    """Of the products within the backbone, fp32, bf16 or fp16, instead of the recipe's."""
    scale: Annotated[Scale, tyro.conf.arg(name="")] = field(default_factory=Scale)
    """How it is computed."""


def start(
    choose: Callable[[str, int], Recipe],
    name: str,
    options: RunOptions,
    *,
    init: str | None = None,
    freeze_backbone_steps: int | None = None,
    teacher: str | None = None,
) -> None:
    """Open the data, train, and print the checkpoint's path. Raises InputError.

    `choose` gives the recipe of a name for a number of images. Several names with commas between train at once, each in a folder of its
    own in `options.out`.
    """
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads {options.threads}: want at least 1")
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    with parallel.joined(pick_device(options.device)) as device:
        dataset = open_images(options.data, options.split)
        if isinstance(dataset, Dataset):
            keep_apart(options.data, options.out)
        names = name.split(",")
        students = [
            Student(one, choose(one, len(dataset)), options.out / one if len(names) > 1 else options.out)
            for one in names
        ]
        if options.precision is not None:
            students = [replace(one, recipe=at_precision(one.recipe, options.precision)) for one in students]
        slow = slow_here(device, students[0].recipe.step.precision)
        if slow and parallel.rank() == 0:
            print(f"note: {slow}", file=sys.stderr)
        if device.type == "cuda" and students[0].recipe.step.precision != "fp32":
            torch.set_float32_matmul_precision(
                "high"
            )  # heads stay in float32, by TF32 where the backbone is narrower still
        train(
            students[0].recipe,
            dataset,
            students[0].out,
            recipe_name=students[0].name,
            beside=students[1:],
            source=options.data,
            revision=source_revision(),
            seed=options.seed,
            workers=options.workers,
            views=options.views,
            device=device,
            init=init,
            freeze_backbone_steps=freeze_backbone_steps,
            teacher=teacher,
            eval_data=options.eval_data,
            eval_every=options.eval_every,
            scale=options.scale,
        )
        if parallel.rank() == 0:
            for student in students:
                print(RunFolder(student.out).checkpoint)


def keep_apart(data: str, out: Path) -> None:
    """Raise InputError for a run folder among the images, which would take the run's own pictures for data from then on."""
    place = out.resolve()
    for folder in (Path(part.strip()).resolve() for part in (data, *data.split(",")) if part.strip()):
        if not folder.is_dir() or not place.is_relative_to(folder):
            continue
        if not any(
            part.startswith(".") for part in place.relative_to(folder).parts
        ):  # hidden folders are not looked into
            raise InputError(
                f"--out {out}: lies in the folder of --data, whose images would then hold the run's own pictures; choose another --out"
            )


def at_precision(recipe: Recipe, precision: Precision) -> Recipe:
    """The recipe whose backbone multiplies in `precision`."""
    return replace(recipe, step=replace(recipe.step, precision=precision))


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
