"""A ResNet as an ONNX graph: `pixels` to `embedding` and `patches`, batch norms folded into the convolutions before them."""

import numpy as np
from torch import nn

from backbones.resnet import Bottleneck, ResNet
from exports.graph import Graph


def add_resnet(graph: Graph, model: ResNet, pixels: str) -> dict[str, str]:
    """Add the network; `pixels` is float32 [B, 3, H, W]. Returns the tensor behind each output."""
    x = graph.op("Relu", _conv(graph, "conv1", graph.half(pixels), model.conv1, model.bn1, sensitive=True))
    x = graph.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for j, block in enumerate(getattr(model, stage)):
            x = _add_bottleneck(graph, f"{stage}.{j}", block, x)
    x = graph.full(x)
    embedding = graph.op("ReduceMean", x, graph.ints(2, 3), keepdims=0, name="embedding")
    flat = graph.op("Reshape", x, graph.ints(0, 0, -1))
    return {"embedding": embedding, "patches": graph.op("Transpose", flat, perm=[0, 2, 1], name="patches")}


def _add_bottleneck(graph: Graph, name: str, block: Bottleneck, x: str) -> str:
    shortcut = x
    if block.downsample is not None:
        shortcut = _conv(graph, f"{name}.downsample", x, *block.downsample)
    for k, (conv, norm) in enumerate(((block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3))):
        x = _conv(graph, f"{name}.conv{k + 1}", x, conv, norm)
        x = graph.op("Relu", x if k < 2 else graph.op("Add", x, shortcut))
    return x


def _conv(graph: Graph, name: str, x: str, conv: nn.Conv2d, norm: nn.BatchNorm2d, sensitive: bool = False) -> str:
    """A convolution with the batch norm after it folded in (in float64, so that folding adds no error of its own)."""
    gain, shift, mean, variance = (
        np.asarray(part.detach(), np.float64)  # type: ignore[union-attr]
        for part in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    factor = gain / np.sqrt(variance + norm.eps)
    kernel = conv.weight.detach().numpy() * factor[:, None, None, None]
    bias, padding = shift - mean * factor, int(conv.padding[0])
    return graph.conv(x, name, kernel, bias, stride=conv.stride[0], padding=padding, sensitive=sensitive)
