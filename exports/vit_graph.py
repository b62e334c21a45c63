"""A ViT as an ONNX graph: `pixels` to `embedding`, `patches` and `attention`, for any size of whole patches or for one.

LayerScale is folded into the linear layer before it and the attention's scale into the queries, so that a block is LayerNorm, MatMul,
Softmax and Gelu, each one operator. Axes as in `backbones.vit`, beside them M the side of the position table and d the width of a head.
"""

from collections.abc import Collection

import numpy as np
from onnx import TensorProto
from torch import Tensor, nn

from backbones.vit import NORM_EPS, Block, LayerScale, Mlp, ViT
from exports.graph import Graph


def add_vit(
    graph: Graph, model: ViT, pixels: str, fixed_px: tuple[int, int] | None = None, layers: Collection[int] = ()
) -> dict[str, str]:
    """Add the network; returns the tensor behind each output of `ViT.outputs`, those of `layers` before the final norm included.

    `pixels` is float32 [B, 3, H, W]. With `fixed_px` (H, W) the position encodings of that size are stored ready-made.
    """
    spec, first = model.spec, 1 + model.spec.registers
    rows_and_columns = _grid_sizes(graph, pixels, spec.patch_px) if fixed_px is None else None
    x = _tokens(graph, model, pixels, rows_and_columns, fixed_px)
    made: dict[str, str] = {}
    for i, block in enumerate(model.blocks):
        last = i == spec.depth - 1
        graph.early = i == 0
        x, weights = _add_block(graph, f"blocks.{i}", block, x, spec.heads, last)  # type: ignore[arg-type]
        if i in layers:
            x = made[f"block{i}"] = graph.op("Identity", x, name=f"block{i}")
        if last:
            attention = after(graph, weights, first, axis=2)
            shape = _grid_shape(graph, rows_and_columns, fixed_px, spec.patch_px)
            made["attention"] = graph.op("Reshape", attention, shape, name="attention")
    normed = layer_norm(graph, "norm", model.norm, x)
    made["embedding"] = graph.op("Gather", normed, graph.constant(0, np.int64), axis=1, name="embedding")
    made["patches"] = after(graph, normed, first, axis=1, name="patches")
    return made


def _grid_sizes(graph: Graph, pixels: str, patch_px: int) -> tuple[str, str]:
    """Rows and columns of patches as int64 [1], read from the pixels when the graph runs."""
    shape = graph.op("Shape", pixels)
    sides = (graph.op("Slice", shape, graph.ints(axis), graph.ints(axis + 1), graph.ints(0)) for axis in (2, 3))
    h, w = (graph.op("Div", side, graph.ints(patch_px)) for side in sides)
    return h, w


def _grid_shape(graph: Graph, sizes: tuple[str, str] | None, fixed_px: tuple[int, int] | None, patch_px: int) -> str:
    """The shape [B, heads, h, w] for a Reshape, whose 0 keeps what is there."""
    if fixed_px is not None:
        return graph.ints(0, 0, *(side // patch_px for side in fixed_px))
    assert sizes is not None
    return graph.op("Concat", graph.ints(0, 0), *sizes, axis=0)


def _tokens(
    graph: Graph, model: ViT, pixels: str, sizes: tuple[str, str] | None, fixed_px: tuple[int, int] | None
) -> str:
    """What enters the first block: CLS and registers, the same for every image, then patches with their positions."""
    spec, projection = model.spec, model.patch_embed.proj
    kernel, bias = projection.weight.detach().numpy(), projection.bias.detach().numpy()  # type: ignore[union-attr]
    patches = graph.full(
        graph.conv(graph.half(pixels), "patch_embed", kernel, bias, stride=spec.patch_px, sensitive=True)
    )
    patches = graph.op("Reshape", patches, graph.ints(0, spec.width, -1))
    patches = graph.op("Transpose", patches, perm=[0, 2, 1])
    if fixed_px is None:
        assert sizes is not None
        positions = _positions(graph, model, *sizes)
    else:
        positions = graph.weight("positions", model.position_encoding(*fixed_px)[0, 1:].detach().numpy())
    patches = graph.op("Add", patches, positions)
    leading = [(model.cls_token + model.pos_embed[:, :1]).detach()]
    leading += [] if model.register_tokens is None else [model.register_tokens.detach()]
    stored = graph.weight("leading_tokens", np.concatenate([tokens.numpy() for tokens in leading], axis=1))
    n_images = graph.op("Slice", graph.op("Shape", patches), graph.ints(0), graph.ints(1), graph.ints(0))
    shape = graph.op("Concat", n_images, graph.ints(1 + spec.registers, spec.width), axis=0)
    return graph.op("Concat", graph.op("Expand", stored, shape), patches, axis=1)


def _positions(graph: Graph, model: ViT, h: str, w: str) -> str:
    """Position encodings [h * w, D]: `backbones.position.resample_table`, operator by operator."""
    side, width = model.spec.grid, model.spec.width
    table = graph.weight("pos_embed", model.pos_embed[0, 1:].detach().numpy().reshape(side, side * width))
    there = [graph.op("Equal", size, graph.ints(side)) for size in (h, w)]
    native = graph.op("And", *there)
    rows_hM, columns_wM = (_resample_matrix(graph, size, native, model) for size in (h, w))
    by_row = graph.op("MatMul", rows_hM, table)  # [h, M * D]
    by_row = graph.op("Reshape", by_row, graph.ints(-1, side, width))
    grid = graph.op("MatMul", columns_wM, by_row)  # [h, w, D]
    return graph.op("Reshape", grid, graph.ints(-1, width))


def _resample_matrix(graph: Graph, n_out: str, native: str, model: ViT) -> str:
    """Weights [n_out, M] of one axis, the identity where the grid is the table's own; `n_out` is int64 [1]."""
    side, offset = model.spec.grid, model.spec.pos_offset

    def number(value: float) -> str:
        return graph.constant(value, np.float32)

    count = graph.op("Squeeze", n_out, graph.ints(0))
    cells = graph.op("Range", graph.constant(0, np.int64), count, graph.constant(1, np.int64))
    step = graph.op("Div", number(side), graph.op("Add", graph.op("Cast", count, to=TensorProto.FLOAT), number(offset)))
    centre = graph.op("Mul", graph.op("Add", graph.op("Cast", cells, to=TensorProto.FLOAT), number(0.5)), step)
    centre = graph.op("Unsqueeze", centre, graph.ints(1))
    beyond = 0 if model.spec.pos_antialias else 2  # cells past each border, read as the border itself
    table = graph.constant((np.arange(-beyond, side + beyond, dtype=np.float32) + 0.5)[None])
    distance = graph.op("Sub", table, centre)
    if model.spec.pos_antialias:
        distance = graph.op("Div", distance, graph.op("Max", step, number(1.0)))
        weights = _cubic_kernel(graph, distance, -0.5)
        weights = graph.op("Div", weights, graph.op("ReduceSum", weights, graph.ints(1), keepdims=1))
    else:
        weights = graph.op("MatMul", _cubic_kernel(graph, distance, -0.75), graph.constant(_fold_borders(side)))
    same = graph.op("Equal", graph.op("Unsqueeze", cells, graph.ints(1)), graph.ints(*range(side)))
    return graph.op("Where", native, graph.op("Cast", same, to=TensorProto.FLOAT), weights)


def _fold_borders(side: int) -> np.ndarray:
    """[side + 4, side] of 0 and 1 that adds the two cells past each border to the border."""
    cells = np.clip(np.arange(-2, side + 2), 0, side - 1)
    return (cells[:, None] == np.arange(side)).astype(np.float32)


def _cubic_kernel(graph: Graph, x: str, a: float) -> str:
    """`backbones.position.cubic_kernel`."""

    def number(value: float) -> str:
        return graph.constant(value, np.float32)

    x = graph.op("Abs", x)
    near = graph.op("Sub", graph.op("Mul", x, number(a + 2)), number(a + 3))
    near = graph.op("Add", graph.op("Mul", graph.op("Mul", near, x), x), number(1.0))
    far = graph.op("Mul", graph.op("Sub", x, number(5.0)), x)
    far = graph.op("Mul", graph.op("Mul", graph.op("Add", far, number(8.0)), x), number(a))
    far = graph.op("Sub", far, number(4 * a))
    beyond = graph.op("Where", graph.op("Less", x, number(2.0)), far, number(0.0))
    return graph.op("Where", graph.op("Less", x, number(1.0)), near, beyond)


def layer_norm(graph: Graph, name: str, norm: nn.LayerNorm, x: str) -> str:
    """`norm` over the last axis; asked for twice under one name its weights are stored once."""
    gain, shift = (graph.weight(f"{name}.{key}", getattr(norm, key).detach().numpy()) for key in ("weight", "bias"))
    return graph.op("LayerNormalization", x, gain, shift, axis=-1, epsilon=NORM_EPS)


def _add_block(graph: Graph, name: str, block: Block, x: str, heads: int, last: bool) -> tuple[str, str]:
    """The block's output [B, T, D], and the CLS query's weights [B, heads, T] where it is the last, else nothing."""
    normed = graph.half(layer_norm(graph, f"{name}.norm1", block.norm1, x))
    mixed, weights = _add_attention(graph, f"{name}.attn", block, normed, heads, last)
    x = graph.op("Add", x, graph.full(mixed))
    normed = graph.half(layer_norm(graph, f"{name}.norm2", block.norm2, x))
    return graph.op("Add", x, graph.full(_add_ffn(graph, f"{name}.mlp", block, normed))), weights


def _add_attention(graph: Graph, name: str, block: Block, x: str, heads: int, last: bool) -> tuple[str, str]:
    qkv = block.attn.qkv
    width = qkv.in_features
    gain = qkv.weight.new_ones(3 * width)
    gain[:width] = block.attn.scale
    bias = None if qkv.bias is None else qkv.bias * gain
    together = graph.linear(x, f"{name}.qkv", qkv.weight * gain[:, None], bias)
    parts = graph.ops("Split", together, names=("", "", ""), axis=-1, num_outputs=3)
    by_head = [graph.op("Reshape", part, graph.ints(0, 0, heads, width // heads)) for part in parts]
    q_BhTd, k_BhdT, v_BhTd = (
        graph.op("Transpose", part, perm=perm)
        for part, perm in zip(by_head, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    mixed = graph.op("MatMul", graph.half(_softmax(graph, graph.op("MatMul", q_BhTd, k_BhdT))), v_BhTd)
    mixed = graph.op("Reshape", graph.op("Transpose", mixed, perm=[0, 2, 1, 3]), graph.ints(0, 0, width))
    out = graph.linear(mixed, f"{name}.proj", *_scaled(block.attn.proj, block.ls1))
    if not last:
        return out, ""
    q_cls = graph.op("Slice", q_BhTd, graph.ints(0), graph.ints(1), graph.ints(2))
    weights = _softmax(graph, graph.op("MatMul", q_cls, k_BhdT))
    return out, graph.op("Squeeze", weights, graph.ints(2))


def _softmax(graph: Graph, scores: str) -> str:
    """In float32 whatever the precision; half cannot hold the sum of many small terms."""
    return graph.op("Softmax", graph.full(scores), axis=-1)


def _add_ffn(graph: Graph, name: str, block: Block, x: str) -> str:
    if isinstance(block.mlp, Mlp):
        hidden = graph.op("Gelu", graph.linear(x, f"{name}.fc1", block.mlp.fc1.weight, block.mlp.fc1.bias))
        return graph.linear(hidden, f"{name}.fc2", *_scaled(block.mlp.fc2, block.ls2))
    both = graph.linear(x, f"{name}.w12", block.mlp.w12.weight, block.mlp.w12.bias)
    gate, value = graph.ops("Split", both, names=("", ""), axis=-1, num_outputs=2)
    hidden = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), value)
    return graph.linear(hidden, f"{name}.w3", *_scaled(block.mlp.w3, block.ls2))


def _scaled(linear: nn.Linear, gain: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer with the LayerScale that follows it folded in."""
    if not isinstance(gain, LayerScale):
        return linear.weight, linear.bias
    return linear.weight * gain.gamma[:, None], None if linear.bias is None else linear.bias * gain.gamma


def after(graph: Graph, x: str, first: int, axis: int, name: str = "") -> str:
    """Everything from `first` on along one axis."""
    return graph.op("Slice", x, graph.ints(first), graph.ints(np.iinfo(np.int64).max), graph.ints(axis), name=name)
