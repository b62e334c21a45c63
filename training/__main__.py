"""Train a backbone: `python -m training --recipe R --data D --out RUN`."""

from typing import Annotated

import tyro

from data.errors import run_cli
from training.command import RunOptions, start
from training.recipes import check_name, find_recipe


def main(
    recipe: str,
    options: Annotated[RunOptions, tyro.conf.arg(name="")],
    init: str | None = None,
    freeze_backbone_steps: int | None = None,
    teacher: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
) -> None:
    """Train a backbone by self-distillation, without labels.

    Run the same command again to resume. Ctrl-C and SIGTERM save first.

    Args:
        recipe: Name of a recipe. dino_small, dinov2_small (GPU), dino_small_cpu and dinov2_small_cpu fit themselves to the number of
            images; smoke and smoke_dinov2 try things; docs/recipes.md lists the published ones. A,B trains several students of
            one --teacher at once, in OUT/A and OUT/B.
        options: The run.
        init: Begin with these weights instead of random ones: a run folder (with its heads) or a backbone as `--ckpt` takes it.
        freeze_backbone_steps: With --init, steps in which only heads learn; by default a tenth of the run and at most 1000 where a backbone
            comes without heads, none where a run brings its own. With --eval-data k-NN then guards the weights.
        teacher: Learn from a frozen teacher: the folder of a finished DINOv2 run, whose predictions a DINOv2 recipe learns, or any backbone
            as `--ckpt` takes it, whose features are learned.
        epochs: Instead of the recipe's.
        batch_size: Images a step, instead of the recipe's; the learning rate follows.
    """
    for name in recipe.split(","):
        check_name(name)
    start(
        lambda name, n_images: find_recipe(name, n_images, batch_size, epochs),
        recipe,
        options,
        init=init,
        freeze_backbone_steps=freeze_backbone_steps,
        teacher=teacher,
    )


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m training"))
