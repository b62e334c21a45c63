"""A request off the wire, and what it is checked against before anything is done for it; the reply that it gets.

Read in this order: InferRequest, InferReply, wanted_outputs, checked_inputs, timeout_of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.decode import DEFAULT_LIMITS
from data.errors import InputError
from server.engine import Engine
from server.formats import FORMAT, check_format
from server.models import ServedModel
from server.shared_memory import Place
from server.tensors import Tensor, TensorSpec


@dataclass(kw_only=True, slots=True)
class InferRequest:
    """One request for one model, off the wire but unchecked. Not frozen, which would make each request's several times as dear."""

    model: str
    tensors: Sequence[Tensor]
    version: str = ""
    outputs: Sequence[str] = ()
    """Names of the outputs wanted; none: all of them."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    protocol: str = ""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Outputs that are wanted in another form than their own."""
    places: Mapping[str, Place] = field(default_factory=dict)
    """Outputs that go into shared memory instead of the reply."""
    timeout_s: float | None = None
    """What the wire's own deadline leaves; the parameter `timeout` (microseconds) can only shorten it."""


@dataclass(slots=True)
class InferReply:
    """The outputs in the order asked for, each with its spec."""

    model: str
    version: str
    id: str
    outputs: tuple[tuple[TensorSpec, np.ndarray], ...]
    engine: Engine
    """The network that answered; another may be served by now."""
    scales: Mapping[str, str] = field(default_factory=dict)
    """Of outputs whose shades stand for values: which (see `formats`)."""

    def __getitem__(self, name: str) -> np.ndarray:
        return next(array for spec, array in self.outputs if spec.name == name)

    @property
    def nbytes(self) -> int:
        """What the outputs take in memory."""
        return sum(size_bytes(array) for _, array in self.outputs)


def wanted_outputs(model: ServedModel, names: Sequence[str]) -> tuple[str, ...]:
    """The outputs asked for in their order, or all. Raises InputError for one that the model has not."""
    known = model.output_specs
    for name in names:
        if name not in known:
            raise InputError(f"model {model.name!r} has no output {name!r:.80}; it has {', '.join(known)}")
    if len(set(names)) != len(names):
        raise InputError("an output is asked for twice")
    return tuple(names or known)


def checked_inputs(model: ServedModel, tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """The inputs by name, each with the datatype and shape that the model declares, and equally many rows."""
    specs = model.input_specs
    inputs: dict[str, np.ndarray] = {}
    for tensor in tensors:
        spec = specs.get(tensor.name)
        if spec is None:
            raise InputError(f"model {model.name!r} has no input {tensor.name!r:.80}; it has {', '.join(specs)}")
        if tensor.name in inputs:
            raise InputError(f"input {tensor.name!r} came twice")
        inputs[tensor.name] = _fit(spec, tensor)
    if len(inputs) < len(specs) or not inputs:
        missing = [spec.name for spec in model.inputs if not spec.optional and spec.name not in inputs]
        if missing or not inputs:
            wanted = missing[0] if missing else " or ".join(specs)
            raise InputError(f"model {model.name!r} wants the input {wanted}, which did not come")
    if len(inputs) > 1:
        counts = {name: len(array) for name, array in inputs.items()}
        if len(set(counts.values())) > 1:
            raise InputError(f"inputs have different numbers of rows: {counts}")
    return inputs


def _fit(spec: TensorSpec, tensor: Tensor) -> np.ndarray:
    array = tensor.array
    if spec.shades and tensor.datatype == "UINT8":
        return _shades(spec, array)
    if tensor.datatype != spec.datatype:
        other = " or UINT8" if spec.shades else ""
        raise InputError(f"input {spec.name!r} is {tensor.datatype}; wanted {spec.datatype}{other}")
    if len(spec.shape) == 1 and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    fits = array.ndim == len(spec.shape) and all(
        wanted in (-1, came) for wanted, came in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"input {spec.name!r} has the shape {list(array.shape)}; wanted {list(spec.shape)}, -1 being any"
        )
    if not len(array):
        raise InputError(f"input {spec.name!r} is an empty batch; wanted at least one row")
    return array


def _shades(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """RGB images of UINT8 as [N,H,W,3]; [N,3,H,W] is turned. What could be both is taken as it came: [N,H,W,3]."""
    if array.ndim != 4 or 3 not in (array.shape[1], array.shape[3]):
        raise InputError(
            f"input {spec.name!r} of UINT8 has the shape {list(array.shape)}; wanted [N,H,W,3] or [N,3,H,W]"
        )
    if not len(array):
        raise InputError(f"input {spec.name!r} is an empty batch; wanted at least one row")
    if array.shape[3] != 3:
        array = array.transpose(0, 2, 3, 1)
    height, width = array.shape[1:3]
    shortest, most = DEFAULT_LIMITS.min_side_px, DEFAULT_LIMITS.max_pixels
    if min(height, width) < shortest or height * width > most:
        raise InputError(
            f"input {spec.name!r} holds images of {width}x{height} pixels; wanted sides of at least {shortest}, and at most {most:,} pixels"
        )
    return array


def chosen_formats(request: InferRequest, outputs: Sequence[TensorSpec]) -> dict[str, str]:
    """Of the outputs that will be made: those that are wanted in another form, from their own parameter `format`, or from the request's
    parameter `OUTPUT.format` (for clients that cannot set the former). Raises InputError."""
    if not request.parameters and not request.formats:
        return {}
    specs = {spec.name: spec for spec in outputs}
    tail = f".{FORMAT}"
    asked = {name.removesuffix(tail): form for name, form in request.parameters.items() if name.endswith(tail)}
    for name, form in asked.items():
        if name not in specs or not isinstance(form, str):
            raise InputError(
                f"parameter {name + tail!r:.80} is {form!r:.40}; wanted OUTPUT{tail} of an output that is asked for"
            )
    return {
        name: check_format(specs[name], form) for name, form in {**asked, **request.formats}.items() if name in specs
    }


def size_bytes(array: np.ndarray) -> int:
    """What an input takes in memory."""
    return sum(len(element) for element in array.flat) if array.dtype == object else array.nbytes


def timeout_of(request: InferRequest) -> float | None:
    """The shorter of the wire's deadline and the request parameter. Raises InputError."""
    given = request.parameters.get("timeout")
    if given is None:
        return request.timeout_s
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < 1 << 63:
        raise InputError(f"parameter 'timeout' is {given!r:.40}; wanted microseconds as a whole number")
    if given == 0:
        return request.timeout_s
    return given / 1e6 if request.timeout_s is None else min(given / 1e6, request.timeout_s)
