"""Train a backbone: `python -m training --recipe R --data D --out RUN`."""

import dataclasses
from typing import Annotated

import tyro

from data.errors import run_cli
from training.command import RunOptions, start
from training.recipes import find_recipe


def main(
    recipe: str,
    options: Annotated[RunOptions, tyro.conf.arg(name="")],
    init: str | None = None,
    teacher: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
) -> None:
    """Train a backbone by self-distillation, without labels.

    Run the same command again to resume. Ctrl-C and SIGTERM save first.

    Args:
        recipe: Name of a recipe: dino_tiny_small_data for a CPU, smoke, smoke_dinov2 to try; training/published.py has the published ones.
        options: The run.
        init: Begin with these weights instead of random ones: a run folder (with its heads) or a backbone as `--ckpt` takes it.
        teacher: Distil the frozen teacher of this finished DINOv2 run, usually of a larger backbone, with its heads.
        epochs: Instead of the recipe's.
        batch_size: Images a step, instead of the recipe's; the learning rate follows.
    """
    chosen = find_recipe(recipe)
    if epochs is not None:
        chosen = dataclasses.replace(chosen, epochs=epochs)
    if batch_size is not None:
        chosen = dataclasses.replace(chosen, batch_size=batch_size)
    start(chosen, recipe, options, init, teacher)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m training"))
