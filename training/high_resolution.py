"""The high-resolution phase: `python -m training.high_resolution --run RUN --px 518 --data D --out NEW`.

A finished run goes on for a short while on larger crops, with resized position encodings and all schedules compressed into that while
(Oquab et al. 2023, section 4: most of the gain of training at full resolution throughout, for a fraction of the cost).
"""

from pathlib import Path
from typing import Annotated

import tyro

from data.errors import run_cli
from training.command import RunOptions, start
from training.recipe import HIGH_RESOLUTION_LR, Recipe
from training.run_folder import RunFolder, read_object


def main(
    run: Path,
    px: int,
    options: Annotated[RunOptions, tyro.conf.arg(name="")],
    epochs: int = 2,
    lr_share: float = HIGH_RESOLUTION_LR,
) -> None:
    """Go on with a finished run on larger crops.

    Run the same command again to resume. Ctrl-C and SIGTERM save first.

    Args:
        run: Folder of the finished run.
        px: Side of the global crops, a multiple of the patch.
        options: The run.
        epochs: Length of the phase; all schedules are compressed into it.
        lr_share: Peak learning rate over the run's.
    """
    resolved = read_object(RunFolder(run).recipe)
    recipe = Recipe.from_json(resolved.get("recipe")).at_high_resolution(px, epochs, lr_share)
    start(lambda *_: recipe, f"{resolved.get('name')} at {px} px", options, init=str(run))


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m training.high_resolution", description=__doc__))
