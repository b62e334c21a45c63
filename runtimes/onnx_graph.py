"""Exported graphs in the form that ONNX Runtime runs best: heads apart from the backbone, attention as one operator.

ONNX Runtime runs the whole graph whichever outputs are asked for (its option to run only what leads to them is for training builds), and a
depth map costs more than an embedding. Graphs cut apart share no weight, so nothing is held twice.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper, numpy_helper

from runtimes.runtime import BACKBONE_OUTPUTS

_LAYER = re.compile(r"block\d+")
"""Name of a tensor that heads read besides the backbone's outputs: the tokens of one block."""


@dataclass(frozen=True)
class HeadPart:
    """A head as a graph of its own: what it reads of the pixels and the backbone's part, and what it makes."""

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    output: str


def outputs_of(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the outputs that a runtime gives; tokens that only heads read are left out."""
    return tuple(output.name for output in model.graph.output if not _LAYER.fullmatch(output.name))


def split_heads(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[HeadPart, ...]]:
    """The backbone with its own outputs and the tensors that heads read, and each head."""
    backbone = [name for name in outputs_of(model) if name in BACKBONE_OUTPUTS]
    heads = [name for name in outputs_of(model) if name not in BACKBONE_OUTPUTS]
    read = {name for node in model.graph.node for name in node.output if _LAYER.fullmatch(name)}
    stops = ["pixels", *backbone, *sorted(read)]
    parts, wanted = [], dict.fromkeys(backbone)
    for name in heads:
        part = cut_graph(model, stops, [name])
        inputs = tuple(value.name for value in part.graph.input)
        parts.append(HeadPart(part, inputs, name))
        wanted |= dict.fromkeys(read.intersection(inputs))
    return cut_graph(model, ["pixels"], list(wanted)), tuple(parts)


def cut_graph(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """The part that leads from `inputs`, those of them that it reads, to `outputs`."""
    graph = model.graph
    maker = {name: k for k, node in enumerate(graph.node) for name in node.output}
    kept: set[int] = set()
    read: set[str] = set(outputs)
    waiting = list(outputs)
    while waiting:
        k = maker.get(waiting.pop())
        if k is None or k in kept:
            continue
        kept.add(k)
        fresh = set(graph.node[k].input) - read - set(inputs)
        read |= set(graph.node[k].input)
        waiting += fresh
    known = {value.name: value for value in (*graph.input, *graph.output)}
    part = helper.make_graph(
        [graph.node[k] for k in sorted(kept)],
        graph.name,
        [_value(known, name) for name in inputs if name in read],
        [_value(known, name) for name in outputs],
        [initializer for initializer in graph.initializer if initializer.name in read],
    )
    return helper.make_model(part, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def _value(known: Mapping[str, onnx.ValueInfoProto], name: str) -> onnx.ValueInfoProto:
    """The declaration of an input or output; tokens of a block are float32 [B, T, D]."""
    return known.get(name) or helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", "tokens", None])


def fuse_attention(model: onnx.ModelProto) -> int:
    """Put ONNX Runtime's own attention operator where a graph spells attention out; returns how many were found.

    It never holds all scores at once, so large images need less memory and time. Other engines do not know it, so exported files
    keep to the standard and are rewritten when they are loaded.
    """
    graph = model.graph
    maker = {name: node for node in graph.node for name in node.output}
    values = {tensor.name: tensor for tensor in graph.initializer}
    fused = {made.output[0]: made for made in _attentions(graph.node, maker, values)}
    if not fused:
        return 0
    nodes = [fused.get(node.output[0], node) for node in graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unread(graph)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return len(fused)


def _attentions(
    nodes: Sequence[onnx.NodeProto],
    maker: Mapping[str, onnx.NodeProto],
    values: Mapping[str, onnx.TensorProto],
) -> Iterator[onnx.NodeProto]:
    """For each Reshape that ends an attention over all heads, the one operator that gives the same."""

    def made_by(name: str, kind: str) -> onnx.NodeProto | None:
        node = maker.get(name)
        return node if node is not None and node.op_type == kind else None

    def tokens(name: str, perm: list[int]) -> tuple[str, int] | None:
        """What [B, T, D] became `name`, and its number of heads."""
        turned = made_by(name, "Transpose")
        split = made_by(turned.input[0], "Reshape") if turned is not None else None
        if turned is None or split is None or list(turned.attribute[0].ints) != perm or split.input[1] not in values:
            return None
        shape = numpy_helper.to_array(values[split.input[1]])
        return (split.input[0], int(shape[2])) if shape.shape == (4,) else None

    for node in nodes:
        turned = made_by(node.input[0], "Transpose") if node.op_type == "Reshape" else None
        mixed = made_by(turned.input[0], "MatMul") if turned is not None else None
        softmax = made_by(mixed.input[0], "Softmax") if mixed is not None else None
        scores = made_by(softmax.input[0], "MatMul") if softmax is not None else None
        if mixed is None or scores is None:
            continue
        q, k = tokens(scores.input[0], [0, 2, 1, 3]), tokens(scores.input[1], [0, 2, 3, 1])
        v = tokens(mixed.input[1], [0, 2, 1, 3])
        if q is None or k is None or v is None or not q[1] == k[1] == v[1]:
            continue
        yield helper.make_node(
            "MultiHeadAttention",
            [q[0], k[0], v[0]],
            list(node.output),
            name=f"{node.name}_attention",
            domain="com.microsoft",
            num_heads=q[1],
            scale=1.0,
        )


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes whose outputs nobody reads."""
    kept: list[onnx.NodeProto] = []
    read = {output.name for output in graph.output}
    for node in reversed(graph.node):
        if read.intersection(node.output):
            kept.append(node)
            read |= set(node.input)
    nodes = list(reversed(kept))
    del graph.node[:]
    graph.node.extend(nodes)
