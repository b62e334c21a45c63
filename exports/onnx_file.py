"""A backbone and its heads -> one ONNX model with its manifests: what goes in, what comes out, and what is put between."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from backbones.checkpoints import MANIFEST_KEY, Backbone
from backbones.heads import LinearHead
from backbones.network import LINEAR_FEATURES, Heads, Network, make_network
from backbones.resnet import ResNet
from backbones.vit import ViT
from data.errors import InputError
from data.preprocess import MAX_VIEW_PX, Preprocess
from exports.graph import Graph, Precision, Value
from exports.head_graph import add_depth, add_linear, add_segmentation
from exports.resnet_graph import add_resnet
from exports.vit_graph import add_vit, after, layer_norm
from exports.weight_writer import WeightWriter
from runtimes.onnx_runtime import EXPORT_KEY, HEADS_KEY
from runtimes.runtime import step_px

ONE_FILE_BYTES = 2**31 - 2**24
"""Weights that fit into one .onnx: a message of protobuf holds 2 GB, and the graph takes a little of them."""
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "int8-static": 1}


@dataclass(frozen=True, kw_only=True)
class OnnxSpec:
    """The form of an exported file."""

    precision: Precision = "fp32"
    """fp32; fp16 (float32 in and out, norms and softmax kept in float32); int8 (for CPUs, scales found while it runs); int8-static
    (Q/DQ pairs with scales calibrated on images, for TensorRT)."""
    fixed_px: tuple[int, int] | None = None
    """Bake one height and width into the file, whole patches each; left out: any."""
    uint8: bool = False
    """Take decoded images, uint8 [N,H,W,3], and normalise them inside; left out: normalised float32 [N,3,H,W]."""


PLAIN = OnnxSpec()


def too_large(backbone: Backbone, heads: Heads, spec: OnnxSpec) -> bool:
    """Whether the weights need a file of their own."""
    parts = [pair[0] for pair in (heads.linear, heads.depth, heads.segmentation) if pair]
    in_heads = sum(weight.numel() for head in parts for weight in head.state_dict().values())
    in_backbone = sum(weight.numel() for weight in backbone.model.state_dict().values())
    return in_backbone * WEIGHT_BYTES[spec.precision] + 4 * in_heads > ONE_FILE_BYTES


def check_spec(backbone: Backbone, spec: OnnxSpec) -> None:
    """Raise InputError for a form that this backbone cannot have."""
    if spec.precision == "int8" and isinstance(backbone.model, ResNet):
        raise InputError("--precision int8 is for ViTs, a ResNet has convolutions; use int8-static or fp16")
    step = step_px(backbone.manifest)
    if spec.fixed_px is not None and any(side < step or side % step or side > MAX_VIEW_PX for side in spec.fixed_px):
        height, width = spec.fixed_px
        raise InputError(
            f"--fixed-px {height} {width}: wanted multiples of the patch, {step}, from {step} to {MAX_VIEW_PX}; "
            f"nearest: {_nearest(height, step)} {_nearest(width, step)}"
        )


def _nearest(side: int, step: int) -> int:
    return min(max(round(side / step), 1), MAX_VIEW_PX // step) * step


def fixed_preprocess(preprocess: Preprocess, fixed_px: tuple[int, int] | None) -> Preprocess:
    """The preprocessing of a file that takes one size only: views of that size, in the proportions of the given one."""
    if fixed_px is None or fixed_px[0] != fixed_px[1]:
        return preprocess
    side = fixed_px[0]
    resize_px = max(side, round(preprocess.resize_px * side / preprocess.size_px))
    return dataclasses.replace(preprocess, size_px=side, resize_px=resize_px, whole_px=side)


def make_graph(
    backbone: Backbone,
    heads: Heads,
    spec: OnnxSpec,
    ranges: Mapping[str, float] | None = None,
    weights: WeightWriter | None = None,
) -> tuple[Graph, dict[str, str]]:
    """The graph, and the tensor behind each of its outputs. `ranges`: largest input of each layer, for int8-static.

    The backbone's weights go to `weights`, where there is one; those of the heads stay in the graph.
    """
    graph, model = Graph(spec.precision, ranges, weights), backbone.model
    network = make_network(backbone, heads)
    pixels = _normalised(graph, backbone.manifest.preprocess) if spec.uint8 else "pixels"
    if isinstance(model, ViT):
        made = add_vit(graph, model, pixels, spec.fixed_px, network.layers_read)
    else:
        assert isinstance(model, ResNet)
        made = add_resnet(graph, model, pixels)
    graph.weights = None
    if heads.linear is not None:
        made["logits"] = _add_linear(graph, network, heads.linear[0], made)
    _add_dense_heads(graph, backbone, heads, made, spec.uint8)
    return graph, {name: made[name] for name in network.output_names}


def _normalised(graph: Graph, preprocess: Preprocess) -> str:
    """uint8 [N,H,W,3] as the network wants it, step by step what `data.preprocess.normalise` does."""
    x = graph.op("Cast", graph.op("Transpose", "pixels", perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
    mean, std = (
        graph.constant(np.reshape(np.array(values, np.float32), (3, 1, 1)))
        for values in (preprocess.mean, preprocess.std)
    )
    return graph.op("Div", graph.op("Sub", graph.op("Div", x, graph.constant(255, np.float32)), mean), std)


def _add_linear(graph: Graph, network: Network, head: LinearHead, made: Mapping[str, str]) -> str:
    _, patch_mean, alternating = LINEAR_FEATURES[network.linear_features]
    cls = [made["embedding"]]
    if network.linear_layers:
        first = graph.constant(0, np.int64)
        rows = [graph.op("Gather", made[f"block{n}"], first, axis=1) for n in network.linear_layers]
        cls = [layer_norm(graph, "norm", network.backbone.norm, row) for row in rows]  # type: ignore[arg-type]
    return add_linear(graph, head, cls, made["patches"] if patch_mean else None, alternating)


def _add_dense_heads(graph: Graph, backbone: Backbone, heads: Heads, made: dict[str, str], uint8: bool) -> None:
    if heads.depth is None and heads.segmentation is None:
        return
    first = 1 if uint8 else 2
    out = graph.op("Slice", graph.op("Shape", "pixels"), graph.ints(first), graph.ints(first + 2), graph.ints(0))
    grid = graph.op("Div", out, graph.ints(step_px(backbone.manifest)))
    if heads.depth is not None:
        depth_head = heads.depth[0]
        patches, cls = _read_layers(graph, backbone, made, depth_head.spec.layers, norm=False)
        made["depth"] = add_depth(graph, depth_head, patches, cls, grid, out)
    if heads.segmentation is not None:
        segmentation_head = heads.segmentation[0]
        patches, _ = _read_layers(graph, backbone, made, segmentation_head.spec.layers, norm=True)
        made["classes"] = add_segmentation(graph, segmentation_head, patches, grid, out)


def _read_layers(
    graph: Graph, backbone: Backbone, made: Mapping[str, str], layers: tuple[int, ...], norm: bool
) -> tuple[str, str]:
    """Patches [B, N, L D] and CLS [B, L D] of the layers that a head reads, as `Network` puts them together."""
    if not layers:
        return made["patches"], made["embedding"]
    model = backbone.model
    assert isinstance(model, ViT)
    tokens = [made[f"block{n}"] for n in layers]
    if norm:
        tokens = [layer_norm(graph, "norm", model.norm, x) for x in tokens]
    joined = graph.op("Concat", *tokens, axis=2)
    cls = graph.op("Gather", joined, graph.constant(0, np.int64), axis=1)
    return after(graph, joined, 1 + model.spec.registers, axis=1), cls


def make_model(
    backbone: Backbone,
    heads: Heads,
    spec: OnnxSpec,
    ranges: Mapping[str, float] | None = None,
    weights: WeightWriter | None = None,
) -> onnx.ModelProto:
    """The whole file: graph, inputs and outputs with their axes, manifests. Large weights go to `weights`, which it finishes."""
    graph, made = make_graph(backbone, heads, spec, ranges, weights)
    stamp = {} if weights is None else {"weights_sha256": weights.finish()}
    preprocess = fixed_preprocess(backbone.manifest.preprocess, spec.fixed_px)
    manifest = dataclasses.replace(backbone.manifest, preprocess=preprocess)
    metadata = {MANIFEST_KEY: manifest.to_json(), EXPORT_KEY: describe(spec, **stamp)}
    if heads.manifests:
        metadata[HEADS_KEY] = {kind: one.to_json() for kind, one in heads.manifests.items()}
    outputs = [_output(name, backbone, heads, spec) for name in made]
    return graph.model(
        [_input(spec)], outputs, {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    )


def describe(spec: OnnxSpec, **more: Any) -> dict[str, Any]:
    """What the file says of its own form, as JSON."""
    fixed = None if spec.fixed_px is None else list(spec.fixed_px)
    return {"precision": spec.precision, "fixed_px": fixed, "input": "uint8" if spec.uint8 else "float32", **more}


def _input(spec: OnnxSpec) -> Value:
    height, width = spec.fixed_px or ("H", "W")
    if spec.uint8:
        return Value("pixels", TensorProto.UINT8, ("N", height, width, 3))
    return Value("pixels", TensorProto.FLOAT, ("N", 3, height, width))


def _output(name: str, backbone: Backbone, heads: Heads, spec: OnnxSpec) -> Value:
    model, step = backbone.model, step_px(backbone.manifest)
    width, n_heads = int(model.embed_dim), model.spec.heads if isinstance(model, ViT) else 0  # type: ignore[arg-type]
    large: tuple[int | str, int | str] = spec.fixed_px or ("H", "W")
    small: tuple[int | str, int | str] = ("h", "w")
    patches: int | str = "patches"
    if spec.fixed_px is not None:
        small = (spec.fixed_px[0] // step, spec.fixed_px[1] // step)
        patches = small[0] * small[1]
    shapes: dict[str, tuple[int | str, ...]] = {
        "embedding": ("N", width),
        "patches": ("N", patches, width),
        "attention": ("N", n_heads, *small),
        "logits": ("N", heads.linear[0].spec.n_classes if heads.linear else 0),
        "depth": ("N", *large),
        "classes": ("N", *large),
    }
    return Value(name, TensorProto.INT32 if name == "classes" else TensorProto.FLOAT, shapes[name])
