"""The v2 protocol's HTTP bodies to InferRequest, and replies back: translation only, as `grpc_messages`.

Binary tensors: a body may be a JSON header and then the raw bytes of its tensors; the header `Inference-Header-Content-Length` says where
the JSON ends, each tensor's parameter `binary_data_size` how long it is. Where that header is 0, the body is the one input of its model: an
image file as it is. (Triton, extension_binary_data.)
"""

import base64
import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from data.errors import InputError
from server.formats import SCALE, asked_form
from server.http_body import compressed
from server.json_text import parse_json, write_json
from server.models import ServedModel
from server.requests import InferReply, InferRequest
from server.service import Service
from server.shared_memory import Place, SharedMemory
from server.tensors import Tensor, from_json, from_raw, object_array, to_json, to_raw

HEADER_LENGTH = "inference-header-content-length"
TIMEOUT_HEADER = "x-timeout-ms"


def read_request(
    body: bytes, model: ServedModel, version: str, request: Request, shared: SharedMemory
) -> tuple[InferRequest, dict[str, Any]]:
    """The body of a request for this model, and its JSON header. Raises InputError."""
    length = request.headers.get(HEADER_LENGTH)
    if length is not None and whole_number(length) == 0:
        return _raw_request(body, model, version, request), {"parameters": {"binary_data_output": True}}
    header, binary = _split(body, length)
    return _request(header, binary, model.name, version, request, shared), header


def _raw_request(body: bytes, model: ServedModel, version: str, request: Request) -> InferRequest:
    """A body that is nothing but one element of the model's only input; the answer is binary too."""
    wanted = "a body without a JSON header (Inference-Header-Content-Length: 0)"
    if len(model.inputs) != 1 or model.inputs[0].datatype != "BYTES":
        inputs = ", ".join(f"{spec.name} ({spec.datatype})" for spec in model.inputs)
        raise InputError(f"{wanted} is for models with one input of BYTES; {model.name!r} has {inputs}")
    if not body:
        raise InputError(f"{wanted} came empty; wanted the bytes of {model.inputs[0].name!r}")
    return InferRequest(
        model=model.name,
        version=version,
        id=request.state.request_id[:128],
        tensors=[Tensor(model.inputs[0].name, "BYTES", object_array([body]))],
        protocol="http",
        timeout_s=timeout_of(request),
    )


def _split(body: bytes, header_length: str | None) -> tuple[dict[str, Any], memoryview]:
    if header_length is None:
        return _told(json_object(parse_json(body), "the request")), memoryview(b"")
    length = whole_number(header_length)
    if length is None or length > len(body):
        raise InputError(f"Inference-Header-Content-Length is {header_length!r:.40}, the body has {len(body)} bytes")
    return _told(json_object(parse_json(body[:length]), "the request")), memoryview(body)[length:]


def _told(header: dict[str, Any]) -> dict[str, Any]:
    """The header without what is null: programs that make requests of a schema send all that one may have."""
    told = _without_nulls(header)
    for name in ("inputs", "outputs"):
        if isinstance(parts := told.get(name), list):
            told[name] = [_without_nulls(one) if isinstance(one, dict) else one for one in parts]
    return told


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    given = {name: inner for name, inner in value.items() if inner is not None}
    if isinstance(parameters := given.get("parameters"), dict):
        given["parameters"] = {name: inner for name, inner in parameters.items() if inner is not None}
    return given


def _request(
    header: dict[str, Any], binary: memoryview, name: str, version: str, request: Request, shared: SharedMemory
) -> InferRequest:
    outputs, given_id = _list(header, "outputs"), header.get("id")
    if not isinstance(given_id, str | int | None):
        raise InputError(f"'id' is {given_id!r:.40}; wanted text")
    parameters = dict(json_object(header.get("parameters", {}), "'parameters'"))
    return InferRequest(
        model=name,
        version=version,
        id=str(given_id or request.state.request_id)[:128],
        tensors=_tensors(_list(header, "inputs"), binary, shared),
        outputs=[_text(output, "name") for output in outputs],
        parameters=parameters,
        formats={
            _text(output, "name"): form
            for output in outputs
            if (form := asked_form(_text(output, "name"), output.get("parameters", {})))
        },
        places={
            _text(output, "name"): place
            for output in outputs
            if (place := Place.of(output.get("parameters", {}), f"output {output.get('name')!r:.80}")) is not None
        },
        protocol="http",
        timeout_s=timeout_of(request),
    )


def _tensors(inputs: list[dict[str, Any]], binary: memoryview, shared: SharedMemory) -> list[Tensor]:
    tensors: list[Tensor] = []
    at = 0
    for one in inputs:
        name, datatype, shape = _text(one, "name"), _text(one, "datatype"), _shape(one)
        parameters = json_object(one.get("parameters", {}), f"'parameters' of input {name!r}")
        place = Place.of(parameters, f"input {name!r:.80}")
        if place is not None:
            tensors.append(from_raw(name, datatype, shape, shared.read(place)))
            continue
        size = parameters.get("binary_data_size")
        if size is None:
            if "data" not in one:
                raise InputError(f"input {name!r} has neither 'data' nor the parameter 'binary_data_size'")
            tensors.append(from_json(name, datatype, shape, one["data"], parameters.get("content_type")))
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary) - at:
            raise InputError(
                f"input {name!r}: binary_data_size is {size!r:.40}, and {len(binary) - at} bytes follow the JSON header; "
                "is Inference-Header-Content-Length set?"
            )
        tensors.append(from_raw(name, datatype, shape, binary[at : at + size]))
        at += size
    if at != len(binary):
        raise InputError(f"{len(binary) - at} bytes are left over after the last binary input")
    return tensors


def reply_response(
    request: Request, service: Service, wanted: InferRequest, reply: InferReply, header: Mapping[str, Any]
) -> Response:
    """The reply as JSON, or as a JSON header and raw bytes where an output was asked for in binary."""
    everything = bool(header.get("parameters", {}).get("binary_data_output", False))
    asked = {output["name"]: output.get("parameters", {}) for output in header.get("outputs", [])}
    outputs, raw = [], []
    for spec, array in reply.outputs:
        entry: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": list(array.shape)}
        told: dict[str, Any] = {SCALE: reply.scales[spec.name]} if spec.name in reply.scales else {}
        if spec.name in wanted.places:
            service.raw(
                wanted, spec.name, array
            )  # and no parameters: Triton's own C++ client takes any for binary data
        elif asked.get(spec.name, {}).get("binary_data", everything):
            raw.append(to_raw(array))
            told |= {"binary_data_size": len(raw[-1])}
        elif spec.datatype == "BYTES" and "png" in spec.formats:
            entry["data"] = [base64.b64encode(file).decode() for file in array.reshape(-1)]
            told |= {"content_type": "base64"}
        else:
            entry["data"] = to_json(array)
        if told:
            entry["parameters"] = told
        outputs.append(entry)
    answer: dict[str, Any] = {"model_name": reply.model, "model_version": reply.version, "outputs": outputs}
    if "id" in header:
        answer["id"] = header["id"]
    text = write_json(answer)
    headers = {HEADER_LENGTH: str(len(text))} if raw else {}
    body, coding = compressed(request, b"".join([text, *raw]))
    return Response(
        body, headers=headers | coding, media_type="application/octet-stream" if raw else "application/json"
    )


def timeout_of(request: Request) -> float | None:
    """Seconds that the client allows, from the header X-Timeout-Ms. Raises InputError."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    milliseconds = whole_number(given)
    if not milliseconds:
        raise InputError(f"X-Timeout-Ms is {given!r:.40}; wanted milliseconds as a whole number above 0")
    return milliseconds / 1000


def whole_number(text: str) -> int | None:
    """A header's value as a number of up to 12 digits; None where it is none."""
    return int(text) if re.fullmatch("[0-9]{1,12}", text) else None


def json_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} is a JSON {type(value).__name__}; wanted an object")
    return value


def _list(header: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    values = header.get(name, [])
    if not isinstance(values, list):
        raise InputError(f"{name!r} is a JSON {type(values).__name__}; wanted a list of objects")
    for value in values:
        json_object(value, f"an element of {name!r}")
        json_object(value.get("parameters", {}), f"'parameters' of an element of {name!r}")
    return values


def _text(value: Mapping[str, Any], name: str) -> str:
    if not isinstance(value.get(name), str):
        raise InputError(f"a tensor's {name!r} is {value.get(name)!r:.40}; wanted text")
    return str(value[name])


def _shape(value: Mapping[str, Any]) -> list[int]:
    shape = value.get("shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
        raise InputError(f"a tensor's 'shape' is {shape!r:.40}; wanted a list of whole numbers")
    return shape
