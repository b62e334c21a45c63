"""Heads as ONNX: `logits`, `depth` and `classes` from what the backbone's graph gives. In float32 whatever the backbone's precision.

Each function mirrors a module of `backbones.heads` or `backbones.dpt`, whose axes it uses.
"""

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto
from torch import nn

from backbones.dpt import LEVELS, DptDecoder, Fusion, Reassemble, Residual
from backbones.heads import AnyDepthHead, DepthHead, DptDepthHead, LinearHead, SegmentationHead
from exports.graph import Graph

Size = str
"""Name of an int64 [2] tensor: rows and columns."""


def add_linear(graph: Graph, head: LinearHead, cls: Sequence[str], patches: str | None, alternating: bool) -> str:
    """`logits` [B, C] of the CLS tokens [B, D] one after another, and behind them the mean patch where `patches` are given.

    Where the head wants the two in turn, feature by feature, its weights are put in the order in which they come here.
    """
    mean = [] if patches is None else [graph.op("ReduceMean", patches, graph.ints(1), keepdims=0)]
    features = [*cls, *mean]
    joined = features[0] if len(features) == 1 else graph.op("Concat", *features, axis=1)
    weight_CD = head.linear.weight.detach().numpy()
    if alternating:
        weight_CD = np.concatenate([weight_CD[:, 0::2], weight_CD[:, 1::2]], axis=1)
    product = graph.op("MatMul", joined, graph.weight("linear_head.weight", weight_CD.T))
    return graph.op("Add", product, graph.weight("linear_head.bias", head.linear.bias.detach().numpy()), name="logits")


def add_segmentation(graph: Graph, head: SegmentationHead, patches: str, grid: Size, out: Size) -> str:
    """`classes` int32 [B, H, W]."""
    weight, bias = head.linear.weight.detach().numpy().T, head.linear.bias.detach().numpy()
    product = graph.op("MatMul", patches, graph.weight("segmentation_head.weight", weight))
    logits = _to_map(graph, graph.op("Add", product, graph.weight("segmentation_head.bias", bias)), grid)
    best = graph.op("ArgMax", _resize(graph, logits, out), axis=1, keepdims=0)
    return graph.op("Cast", best, to=TensorProto.INT32, name="classes")


def add_depth(graph: Graph, head: AnyDepthHead, patches: str, cls: str, grid: Size, out: Size) -> str:
    """`depth` [B, H, W] from patches and CLS of the layers that the head reads, one after another."""
    small = (
        _binned_depth(graph, head, patches, cls, grid)
        if isinstance(head, DepthHead)
        else _dpt_depth(graph, head, patches, cls, grid)
    )
    large = graph.op("Squeeze", _resize(graph, small, out), graph.ints(1), name="depth" * isinstance(head, DepthHead))
    if isinstance(head, DepthHead):
        return large
    return graph.op("Min", large, graph.constant(head.spec.max_depth, np.float32), name="depth")


def _binned_depth(graph: Graph, head: DepthHead, patches: str, cls: str, grid: Size) -> str:
    """The weighted mean of the bins' centres; CLS is the same for every patch, so its part of the product is taken once."""
    weight_KI = head.linear.weight.detach().numpy()
    half = weight_KI.shape[1] // 2
    of_patch, of_cls = (
        graph.weight(f"depth_head.{name}", part.T)
        for name, part in (("patch", weight_KI[:, :half]), ("cls", weight_KI[:, half:]))
    )
    bias = graph.weight("depth_head.bias", head.linear.bias.detach().numpy())
    shared = graph.op("Unsqueeze", graph.op("Add", graph.op("MatMul", cls, of_cls), bias), graph.ints(1))
    logits = _to_map(graph, graph.op("Add", graph.op("MatMul", patches, of_patch), shared), grid)
    finer = graph.op("Mul", grid, graph.ints(head.ENLARGEMENT))
    weights = graph.op("Relu", _resize(graph, logits, finer))
    weights = graph.op("Add", weights, graph.constant(head.FLOOR, np.float32))
    spec = head.spec
    centres = np.linspace(spec.min_depth, spec.max_depth, spec.bins, dtype=np.float64).astype(np.float32)
    sums = graph.weight("depth_head.sums", np.stack([centres, np.ones_like(centres)])[:, :, None, None])
    both = graph.op("Conv", weights, sums, kernel_shape=[1, 1])
    return graph.op("Div", *graph.ops("Split", both, names=("", ""), axis=1, num_outputs=2))


def _dpt_depth(graph: Graph, head: DptDepthHead, patches: str, cls: str, grid: Size) -> str:
    parts = [graph.ops("Split", tokens, names=("",) * LEVELS, axis=-1, num_outputs=LEVELS) for tokens in (patches, cls)]
    raw = _decode(graph, head.decoder, list(zip(*parts, strict=True)), grid)
    return graph.op("Add", graph.op("Relu", raw), graph.constant(head.spec.min_depth, np.float32))


def _decode(graph: Graph, decoder: DptDecoder, layers: list[tuple[str, ...]], grid: Size) -> str:
    """`DptDecoder.forward`."""
    maps = []
    for level, (patches, cls) in enumerate(layers):
        reassembled = _reassemble(graph, f"dpt.reassemble.{level}", decoder.reassemble[level], patches, cls, grid)  # type: ignore[arg-type]
        maps.append(_conv(graph, f"dpt.convs.{level}", decoder.convs[level], reassembled))  # type: ignore[arg-type]
    merged = _fuse(graph, f"dpt.fusions.{LEVELS - 1}", decoder.fusions[-1], maps[-1], None)  # type: ignore[arg-type]
    for level in reversed(range(LEVELS - 1)):
        merged = _fuse(graph, f"dpt.fusions.{level}", decoder.fusions[level], merged, maps[level])  # type: ignore[arg-type]
    fine = _doubled(
        graph,
        _conv(
            graph, "dpt.halve", decoder.halve, graph.op("Relu", _conv(graph, "dpt.project", decoder.project, merged))
        ),
    )
    return _conv(graph, "dpt.last", decoder.last, graph.op("Relu", _conv(graph, "dpt.narrow", decoder.narrow, fine)))


def _reassemble(graph: Graph, name: str, module: Reassemble, patches: str, cls: str, grid: Size) -> str:
    width = module.project.in_channels
    weight_OI = module.readout.weight.detach().numpy()
    of_patch, of_cls = (
        graph.weight(f"{name}.{part}", weight_OI[:, columns].T)
        for part, columns in (("patch", slice(0, width)), ("cls", slice(width, None)))
    )
    bias = graph.weight(f"{name}.bias", module.readout.bias.detach().numpy())
    shared = graph.op("Unsqueeze", graph.op("Add", graph.op("MatMul", cls, of_cls), bias), graph.ints(1))
    mixed = graph.op("Gelu", graph.op("Add", graph.op("MatMul", patches, of_patch), shared))
    projected = _conv(graph, f"{name}.project", module.project, _to_map(graph, mixed, grid))
    if isinstance(module.resize, nn.Identity):
        return projected
    return _conv(graph, f"{name}.resize", module.resize, projected)


def _fuse(graph: Graph, name: str, module: Fusion, merged: str, finer: str | None) -> str:
    if module.of_finer is not None and finer is not None:
        finer = _resize(graph, finer, _size_of(graph, merged))
        merged = graph.op("Add", merged, _residual(graph, f"{name}.of_finer", module.of_finer, finer))
    return _conv(
        graph,
        f"{name}.project",
        module.project,
        _doubled(graph, _residual(graph, f"{name}.of_sum", module.of_sum, merged)),
    )


def _residual(graph: Graph, name: str, module: Residual, x: str) -> str:
    inner = _conv(graph, f"{name}.conv1", module.conv1, graph.op("Relu", x))
    return graph.op("Add", x, _conv(graph, f"{name}.conv2", module.conv2, graph.op("Relu", inner)))


def _conv(graph: Graph, name: str, conv: nn.Conv2d | nn.ConvTranspose2d, x: str) -> str:
    kind = "ConvTranspose" if isinstance(conv, nn.ConvTranspose2d) else "Conv"
    given = [x, graph.weight(f"{name}.weight", conv.weight.detach().numpy())]
    if conv.bias is not None:
        given.append(graph.weight(f"{name}.bias", conv.bias.detach().numpy()))
    return graph.op(
        kind,
        *given,
        kernel_shape=list(conv.kernel_size),
        strides=list(conv.stride),
        pads=[*conv.padding, *conv.padding],
    )


def _to_map(graph: Graph, patches: str, grid: Size) -> str:
    """[B, N, C] to [B, C, h, w]."""
    shape = graph.op("Concat", graph.ints(0, 0), grid, axis=0)
    return graph.op("Reshape", graph.op("Transpose", patches, perm=[0, 2, 1]), shape)


def _size_of(graph: Graph, x: str) -> Size:
    return graph.op("Slice", graph.op("Shape", x), graph.ints(2), graph.ints(4), graph.ints(0))


def _doubled(graph: Graph, x: str) -> str:
    return _resize(graph, x, graph.op("Mul", _size_of(graph, x), graph.ints(2)), corners=True)


def _resize(graph: Graph, x: str, size: Size, corners: bool = False) -> str:
    """Bilinear, to the rows and columns of `size`; with `corners` the corners stay where they are."""
    outer = graph.op("Slice", graph.op("Shape", x), graph.ints(0), graph.ints(2), graph.ints(0))
    sizes = graph.op("Concat", outer, size, axis=0)
    mode = "align_corners" if corners else "half_pixel"
    return graph.op("Resize", x, "", "", sizes, mode="linear", coordinate_transformation_mode=mode)
