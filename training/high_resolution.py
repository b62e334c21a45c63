"""The high-resolution phase: `python -m training.high_resolution --run RUN --px 518 --data D --out NEW`.

A finished run, or a backbone, goes on for a short while on larger crops, with resized position encodings and all schedules compressed into
that while (Oquab et al. 2023, section 4: most of the gain of training at full resolution throughout, for a fraction of the cost).
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from backbones.checkpoints import load_backbone
from data.errors import InputError, run_cli
from training.command import RunOptions, start
from training.recipe import HIGH_RESOLUTION_LR, Recipe
from training.recipes import check_name, find_recipe
from training.run_folder import RunFolder, read_object


def main(
    run: str,
    px: int,
    options: Annotated[RunOptions, tyro.conf.arg(name="")],
    recipe: str | None = None,
    epochs: int = 2,
    steps: int | None = None,
    lr_share: float = HIGH_RESOLUTION_LR,
    freeze_backbone_steps: int | None = None,
    teacher: str | None = None,
) -> None:
    """Go on with a finished run, or a backbone, on larger crops.

    Run the same command again to resume. Ctrl-C and SIGTERM save first.

    Args:
        run: Folder of the finished run; or a backbone as `--ckpt` takes it, whose heads then start fresh.
        px: Side of the global crops, a multiple of the patch.
        options: The run.
        recipe: Recipe of the backbone, where its checkpoint names none.
        epochs: Length of the phase; all schedules are compressed into it.
        steps: Length in steps instead; the paper's is 10000.
        lr_share: Peak learning rate over the run's.
        freeze_backbone_steps: As for `python -m training`.
        teacher: As for `python -m training`; a run that learned from a teacher goes on with one.
    """
    if recipe is not None:
        check_name(recipe)
    if steps is not None and steps < 1:
        raise InputError(f"--steps {steps}: want at least 1")
    if teacher is None and (named := teacher_of(run)):
        raise InputError(f"{run}: learned from the teacher {named}; name it, or another that fits, with --teacher")
    name, first = (recipe, None) if recipe else recipe_behind(run)

    def choose(_: str, n_images: int) -> Recipe:
        whole = first or find_recipe(str(recipe), n_images)
        if steps is None:
            return whole.at_high_resolution(px, epochs, lr_share)
        return replace(whole.at_high_resolution(px, 1, lr_share), epoch_steps=steps)

    start(
        choose,
        f"{name} at {px} px",
        options,
        init=run,
        freeze_backbone_steps=freeze_backbone_steps,
        teacher=teacher,
    )


def teacher_of(run: str) -> str | None:
    """What a run named for its teacher; None of a run that learned from itself, and of a backbone, which does not tell."""
    recipe = RunFolder(Path(run)).recipe
    told = read_object(recipe).get("teacher") if recipe.is_file() else None
    return str(told.get("run")) if isinstance(told, dict) else None


def recipe_behind(run: str) -> tuple[str, Recipe]:
    """Name and recipe of a run, or of the run that a checkpoint comes from. Raises InputError where there is none."""
    folder = RunFolder(Path(run))
    if folder.recipe.is_file():
        resolved = read_object(folder.recipe)
        return str(resolved.get("name")), Recipe.from_json(resolved.get("recipe"))
    values = dict(load_backbone(run).manifest.recipe or {})
    name = values.pop("name", None)
    values.pop("seed", None)
    if name is None:
        raise InputError(f"{run}: says nothing of a recipe; name one of its architecture with --recipe")
    return str(name), Recipe.from_json(values)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m training.high_resolution", description=__doc__))
