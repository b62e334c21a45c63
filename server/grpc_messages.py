"""ModelInfer's messages to InferRequest, and replies back: translation only, on the stubs that come with tritonclient."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from data.errors import InputError
from server.formats import SCALE, asked_form
from server.infer_message import KEPT_HEADS, InferMessage, read_head
from server.requests import InferReply, InferRequest
from server.service import Service
from server.shared_memory import BYTE_SIZE, OFFSET, REGION, Place, SharedMemory
from server.tensors import Tensor, from_raw, from_values

_CONTENTS_OF = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


@dataclass(frozen=True)
class _Input:
    """An input as the message announces it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    place: Place | None
    typed: bool
    """Whether its values lie in the head, as typed contents."""


@dataclass(frozen=True)
class _Asked:
    """What a message's head asks for. Requests with equal heads share it: nobody may write to it."""

    model: str
    version: str
    inputs: tuple[_Input, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[str, Any]
    formats: Mapping[str, str]
    places: Mapping[str, Place]


def request_from(sent: InferMessage, called: str, timeout_s: float | None, shared: SharedMemory) -> InferRequest:
    """The protocol's message as an InferRequest with this id. Raises InputError where it contradicts itself."""
    asked = _asked(sent.fields) if sent.head is None else _asked_in(sent.head)
    return InferRequest(
        model=asked.model,
        version=asked.version,
        id=called,
        tensors=_tensors(asked.inputs, sent, shared),
        outputs=asked.outputs,
        parameters=asked.parameters,
        formats=asked.formats,
        places=asked.places,
        protocol="grpc",
        timeout_s=timeout_s,
    )


def _asked(fields: Any) -> _Asked:
    of_outputs = {output.name: parameters(output.parameters) for output in fields.outputs}
    places = {name: Place.of(given, f"output {name!r:.80}") for name, given in of_outputs.items()}
    return _Asked(
        fields.model_name,
        fields.model_version,
        tuple(_input(one) for one in fields.inputs),
        tuple(output.name for output in fields.outputs),
        parameters(fields.parameters),
        {name: form for name, given in of_outputs.items() if (form := asked_form(name, given))},
        {name: place for name, place in places.items() if place is not None},
    )


@lru_cache(KEPT_HEADS)
def _asked_in(head: bytes) -> _Asked:
    return _asked(read_head(head))


def _input(tensor: Any) -> _Input:
    place = Place.of(parameters(tensor.parameters), f"input {tensor.name!r:.80}")
    return _Input(tensor.name, tensor.datatype, tuple(tensor.shape), place, tensor.HasField("contents"))


def _tensors(inputs: Sequence[_Input], sent: InferMessage, shared: SharedMemory) -> list[Tensor]:
    """The inputs, each from shared memory, from the raw contents, or where there are none of these from its typed ones."""
    inside = sum(one.place is None for one in inputs)
    raw = iter(sent.raw)
    if sent.raw and len(sent.raw) != inside:
        raise InputError(f"{inside} inputs and {len(sent.raw)} raw_input_contents came; wanted one for each")
    tensors = []
    for number, one in enumerate(inputs):
        if one.place is not None:
            tensors.append(from_raw(one.name, one.datatype, one.shape, shared.read(one.place)))
        elif not sent.raw:
            tensors.append(_typed(sent.fields.inputs[number]))
        elif one.typed:
            raise InputError(f"input {one.name!r} has typed contents beside raw_input_contents; wanted one of the two")
        else:
            tensors.append(from_raw(one.name, one.datatype, one.shape, next(raw)))
    return tensors


def _typed(tensor: Any) -> Tensor:
    field = _CONTENTS_OF.get(tensor.datatype)
    if field is None:
        return from_raw(tensor.name, tensor.datatype, tensor.shape, b"")
    values = getattr(tensor.contents, field)
    return from_values(
        tensor.name, tensor.datatype, tensor.shape, list(values) if field == "bytes_contents" else values
    )


def parameters(sent: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol's parameters as plain values."""
    chosen = {name: parameter.WhichOneof("parameter_choice") for name, parameter in sent.items()}
    return {name: getattr(sent[name], field) for name, field in chosen.items() if field}


def reply_message(service: Service, request: InferRequest, reply: InferReply, request_id: str) -> Any:
    """The reply as the protocol's message: raw contents for every output that is not in shared memory, in the order of the outputs."""
    response = pb.ModelInferResponse(model_name=reply.model, model_version=reply.version, id=request_id)
    for spec, array in reply.outputs:
        output = response.outputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        if spec.name in reply.scales:
            output.parameters[SCALE].string_param = reply.scales[spec.name]
        content = service.raw(request, spec.name, array)
        response.raw_output_contents.append(content or b"")  # clients count outputs and contents alike
        if content is not None:
            continue
        place = request.places[spec.name]
        output.parameters[REGION].string_param = place.region
        output.parameters[BYTE_SIZE].int64_param = place.byte_size
        output.parameters[OFFSET].int64_param = place.offset
    return response
