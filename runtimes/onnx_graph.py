"""An exported graph in two: the backbone, and the depth head that continues from its outputs.

ONNX Runtime runs the whole graph whichever outputs are asked for (its option to run only what leads to them is for
training builds), and a depth map costs more than an embedding. Two graphs share no weight, so nothing is held twice.
"""

from collections.abc import Sequence

import onnx


def split_off_depth(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """(pixels to all outputs but `depth`, pixels with `embedding` and `patches` to `depth`)."""
    others = [output.name for output in model.graph.output if output.name != "depth"]
    return cut_graph(model, ["pixels"], others), cut_graph(model, ["pixels", "embedding", "patches"], ["depth"])


def cut_graph(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """The part that leads from `inputs` to `outputs`; both are inputs or outputs of the whole graph."""
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
    part = onnx.helper.make_graph(
        [graph.node[k] for k in sorted(kept)],
        graph.name,
        [known[name] for name in inputs],
        [known[name] for name in outputs],
        [initializer for initializer in graph.initializer if initializer.name in read],
    )
    return onnx.helper.make_model(part, opset_imports=list(model.opset_import), ir_version=model.ir_version)
