"""How good the teacher is while it learns: k-NN on a labelled set, as `python -m evaluators.knn` measures a finished backbone."""

import copy

from backbones.checkpoints import Backbone, Manifest
from backbones.resnet import ResNet
from backbones.vit import ViT
from evaluators.extract import ExtractSpec, extract
from evaluators.knn import evaluate
from evaluators.splits import open_splits
from runtimes.torch_runtime import TorchRuntime


class KnnProbe:
    """The labelled set of a run. Raises InputError, at once, for one without two labelled parts."""

    def __init__(self, data: str) -> None:
        self.splits = open_splits(data)
        self.spec = ExtractSpec(columns=("embedding",), group_column=self.splits.group_column)

    def top1(self, backbone: ViT | ResNet, manifest: Manifest, device: str) -> float:
        """k-NN top-1 of `backbone`, 0 to 1; k is chosen on the training part. The backbone itself stays as it is."""
        runtime = TorchRuntime(Backbone(copy.deepcopy(backbone), manifest), device=device)
        train, test = (extract(runtime, part, self.spec) for part in (self.splits.train, self.splits.val))
        return evaluate(train, test).metrics["top1"].value
