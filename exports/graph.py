"""An ONNX graph under construction: named constants, nodes, and the two layers whose precision can be chosen.

Graphs are written node by node rather than traced: a trace takes a minute and a gigabyte, and what it gives must be searched for the
patterns that an engine runs fast. Only operators of the standard are used, so that every engine can read the file.

Precisions: `fp32`; `fp16` (linear layers and convolutions in half, everything between them in float32); `int8` (linear layers in whole
numbers, but those of the first block, the scale of their input found while they run); `int8-static` (Q/DQ pairs with scales found
beforehand, symmetric).
Axes: I features in, O features out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from exports.weight_writer import LEAST_BYTES, WeightWriter

OPSET = 20
"""The first with Gelu as one operator."""
IR_VERSION = 10
Precision = Literal["fp32", "fp16", "int8", "int8-static"]
DYNAMIC_LEVELS = 64
"""Largest whole number of a weight beside inputs of 8 bits without sign: processors without VNNI add two products in 16 bits, and
2 * 255 * 64 is the most that fits."""
STATIC_LEVELS = 127
_TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}


@dataclass(frozen=True)
class Value:
    """An input or output: name, element type of ONNX, and axes as numbers or names."""

    name: str
    kind: int
    shape: tuple[int | str, ...]

    def proto(self) -> onnx.ValueInfoProto:
        """The same in ONNX's own words."""
        return helper.make_tensor_value_info(self.name, self.kind, list(self.shape))


class Graph:
    """Nodes and constants so far; `op` adds a node and returns the name of what it makes."""

    def __init__(
        self,
        precision: Precision = "fp32",
        ranges: Mapping[str, float] | None = None,
        weights: WeightWriter | None = None,
    ) -> None:
        self.precision = precision
        self.weights = weights
        """Where large weights go instead of into the graph itself."""
        self.early = False
        """True while layers are added whose rounding all others magnify; dynamic int8 leaves them in float32."""
        self.quantised_inputs: dict[str, str] = {}
        """Each linear layer or convolution, and the name of the tensor that goes into it: what a calibration looks at."""
        self._ranges = ranges or {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._names: set[str] = set()
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._quantised: dict[str, tuple[str, str, str]] = {}
        self._cast: dict[tuple[str, int], str] = {}

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one output, called `name` where one is given."""
        return self.ops(kind, *inputs, names=(name,), **attributes)[0]

    def ops(self, kind: str, *inputs: str, names: Sequence[str], **attributes: Any) -> tuple[str, ...]:
        """Add a node with as many outputs as `names`; empty names are made up."""
        made = tuple(name or f"{kind}_{len(self._nodes)}_{k}" for k, name in enumerate(names))
        self._nodes.append(
            helper.make_node(kind, inputs, made, name=f"{kind}_{len(self._nodes)}", domain="", **attributes)
        )
        return made

    def constant(self, value: Any, dtype: Any = None) -> str:
        """A small constant; equal ones are stored once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self.weight(f"constant_{len(self._known)}", array)
        return self._known[key]

    def ints(self, *values: int) -> str:
        """A constant list of int64, as shapes and axes are."""
        return self.constant(values, np.int64)

    def weight(self, name: str, array: np.ndarray) -> str:
        """A constant of this name, which stands for the same values wherever it is used."""
        if name in self._names:
            return name
        self._names.add(name)
        if self.weights is not None and array.nbytes >= LEAST_BYTES:
            self._initializers.append(self.weights.add(name, array))
        else:
            self._initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def cast(self, x: str, kind: int) -> str:
        """`x` in another element type; asked for twice it is cast once."""
        if (x, kind) not in self._cast:
            self._cast[x, kind] = self.op("Cast", x, to=kind)
        return self._cast[x, kind]

    def half(self, x: str) -> str:
        """`x` in float16 where the precision is fp16, else `x`."""
        return self.cast(x, TensorProto.FLOAT16) if self.precision == "fp16" else x

    def full(self, x: str) -> str:
        """`x` in float32 again where the precision is fp16, else `x`."""
        return self.cast(x, TensorProto.FLOAT) if self.precision == "fp16" else x

    def linear(self, x: str, name: str, weight_OI: Tensor, bias_O: Tensor | None) -> str:
        """x [..., I] to [..., O]. In fp16 `x` and the result are float16, else float32."""
        self.quantised_inputs[name] = x
        weight_IO = weight_OI.detach().numpy().T
        if self.precision == "int8" and not self.early:
            made = self._dynamic_product(x, name, weight_IO)
        elif self.precision == "int8-static":
            made = self.op("MatMul", self._fake_quantised(x, name), self._stored_int8(name, weight_IO, axis=1))
        else:
            made = self.op("MatMul", x, self.weight(f"{name}.weight", self._narrow(weight_IO)))
        if bias_O is None:
            return made
        return self.op("Add", made, self.weight(f"{name}.bias", self._narrow(bias_O.detach().numpy())))

    def conv(
        self,
        x: str,
        name: str,
        weight: np.ndarray,
        bias: np.ndarray | None,
        *,
        stride: int,
        padding: int = 0,
        sensitive: bool = False,
    ) -> str:
        """A square convolution, weight [O, I, k, k]. In fp16 `x` and the result are float16, else float32.

        One that is `sensitive`, as the first of a network is, is never computed in whole numbers.
        """
        if not sensitive:
            self.quantised_inputs[name] = x
        if self.precision == "int8-static" and not sensitive:
            x, kernel = self._fake_quantised(x, name), self._stored_int8(name, weight, axis=0)
        else:
            kernel = self.weight(f"{name}.weight", self._narrow(weight))
        given = [x, kernel] + ([] if bias is None else [self.weight(f"{name}.bias", self._narrow(bias))])
        side = weight.shape[2]
        return self.op("Conv", *given, kernel_shape=[side] * 2, strides=[stride] * 2, pads=[padding] * 4)

    def _narrow(self, array: np.ndarray) -> np.ndarray:
        return array.astype(np.float16 if self.precision == "fp16" else np.float32)

    def _dynamic_product(self, x: str, name: str, weight_IO: np.ndarray) -> str:
        """The pattern that ONNX Runtime runs as one operator."""
        if x not in self._quantised:
            self._quantised[x] = self.ops("DynamicQuantizeLinear", x, names=("", "", ""))  # type: ignore[assignment]
        x_int, x_scale, x_zero = self._quantised[x]
        weight_int, scale_O = quantise(weight_IO, 1, DYNAMIC_LEVELS)
        stored = self.weight(f"{name}.weight", weight_int)
        product = self.op("MatMulInteger", x_int, stored, x_zero)
        scale = self.op("Mul", x_scale, self.weight(f"{name}.weight_scale", scale_O))
        return self.op("Mul", self.op("Cast", product, to=TensorProto.FLOAT), scale)

    def _fake_quantised(self, x: str, name: str) -> str:
        """`x` rounded to 8 bits with the calibrated scale of this layer's input."""
        scale = self.constant(self._ranges[name] / STATIC_LEVELS, np.float32)
        zero = self.constant(0, np.int8)
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, scale, zero), scale, zero)

    def _stored_int8(self, name: str, weight: np.ndarray, axis: int) -> str:
        """A weight stored as int8 with a scale for each slice of `axis`."""
        weight_int, scale = quantise(weight, axis, STATIC_LEVELS)
        stored = self.weight(f"{name}.weight", weight_int)
        zeros = self.constant(np.zeros(len(scale), np.int8))
        return self.op("DequantizeLinear", stored, self.weight(f"{name}.weight_scale", scale), zeros, axis=axis)

    def model(self, inputs: Sequence[Value], outputs: Sequence[Value], metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The finished model. The weights move into it, so that they are held once."""
        graph = helper.make_graph(
            self._nodes, "dinoscope", [value.proto() for value in inputs], [value.proto() for value in outputs]
        )
        while self._initializers:
            graph.initializer.append(self._initializers.pop(0))
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="dinoscope"
        )
        helper.set_model_props(model, dict(metadata))
        return model


def quantise(weight: np.ndarray, axis: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 of the same shape, symmetric from -levels to levels, and the float32 scale of each slice of `axis`."""
    others = tuple(k for k in range(weight.ndim) if k != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    scale = np.maximum(largest, 1e-12) / levels
    whole = np.clip(np.rint(weight / scale), -levels, levels).astype(np.int8)
    return whole, scale.reshape(-1).astype(np.float32)
