"""How good the teacher is while it learns: k-NN on a labelled set, as `python -m evaluators.knn` measures a finished backbone."""

import copy
from dataclasses import dataclass

from backbones.checkpoints import Backbone, Manifest
from backbones.resnet import ResNet
from backbones.vit import ViT
from data.errors import InputError
from evaluators.extract import ExtractSpec, extract
from evaluators.knn import evaluate
from evaluators.splits import open_splits
from runtimes.torch_runtime import TorchRuntime


@dataclass(frozen=True, kw_only=True)
class EvalEvery:
    """How often the teacher is measured."""

    eval_every_epochs: float = 1.0
    """Epochs between two measurements by k-NN on `eval_data`; 0.25 measures four times an epoch."""
    eval_every_steps: int | None = None
    """Steps between two measurements, instead of epochs."""

    def steps(self, steps_per_epoch: int) -> int:
        """The period in steps. Raises InputError for none."""
        if self.eval_every_steps is not None:
            if self.eval_every_steps < 1:
                raise InputError(f"--eval-every-steps {self.eval_every_steps}: want at least 1")
            return self.eval_every_steps
        if not self.eval_every_epochs > 0:
            raise InputError(f"--eval-every-epochs {self.eval_every_epochs}: want more than 0")
        return max(round(min(self.eval_every_epochs, 1e9) * steps_per_epoch), 1)


class KnnProbe:
    """The labelled set of a run, and after how many steps it is asked.

    Raises InputError, at once, for a set without two labelled parts.
    """

    def __init__(self, data: str, every_steps: int) -> None:
        self.every_steps = every_steps
        self.splits = open_splits(data)
        for part in (self.splits.train, self.splits.val):
            part.labels()
        if len(self.splits.train.classes) < 2:
            raise InputError(
                f"--eval-data {data}: all images are of the class {self.splits.train.classes[0]!r}; wanted at least two classes"
            )
        self.spec = ExtractSpec(columns=("embedding",), group_column=self.splits.group_column)

    def is_due(self, step: int, end: int) -> bool:
        """Whether to measure now that `step` steps are done: each period, and at the end."""
        return step % self.every_steps == 0 or step == end

    def top1(self, backbone: ViT | ResNet, manifest: Manifest, device: str) -> float:
        """k-NN top-1 of `backbone`, 0 to 1; k is chosen on the training part. The backbone itself stays as it is."""
        runtime = TorchRuntime(Backbone(copy.deepcopy(backbone), manifest), device=device)
        train, test = (extract(runtime, part, self.spec) for part in (self.splits.train, self.splits.val))
        return evaluate(train, test).metrics["top1"].value
