"""KServe v2 over HTTP: the REST twins of the RPCs, with JSON or binary tensors, plain or compressed.

Only translation, as in `grpc_api`. Binary tensors: a body may be a JSON header and then the raw bytes of its tensors; the
header `Inference-Header-Content-Length` says where the JSON ends, each tensor's parameter `binary_data_size` how
long it is. (Triton, extension_binary_data.)
"""

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from data.errors import InputError
from server import describe
from server.errors import Draining
from server.formats import FORMAT, SCALE
from server.http_body import compressed, parse_json, read_body, unless_disconnected
from server.openapi import (
    BINARY,
    PROBLEMS,
    InferAnswer,
    InferBody,
    ModelConfig,
    ModelMetadata,
    ModelState,
    Region,
    ServerMetadata,
    Statistics,
    answers,
)
from server.repository import Repository
from server.requests import UNSUPPORTED, InferReply, InferRequest
from server.service import Service, off_loop_if_large
from server.shared_memory import Place, SharedMemory
from server.tensors import Tensor, from_json, from_raw, to_json, to_raw

HEADER_LENGTH = "inference-header-content-length"
TIMEOUT_HEADER = "x-timeout-ms"


def make_v2_routes(service: Service, repository: Repository, max_body_bytes: int) -> APIRouter:
    """All routes below /v2."""
    router = APIRouter(tags=["KServe v2"], responses=PROBLEMS)

    @router.get("/v2", responses=answers(ServerMetadata), summary="Server name, version, extensions")
    async def server_metadata() -> JSONResponse:
        return JSONResponse(describe.server_metadata())

    @router.head("/v2/health/live", include_in_schema=False)
    @router.get("/v2/health/live", summary="The process answers", response_class=Response)
    async def live() -> Response:
        return Response()

    @router.head("/v2/health/ready", include_in_schema=False)
    @router.get(
        "/v2/health/ready",
        responses={503: {"description": "Not yet, or no longer"}},
        summary="Requests are taken",
        response_class=Response,
    )
    async def ready() -> Response:
        return Response(status_code=200 if service.ready else 503)

    @router.get("/v2/models/stats", responses=answers(Statistics), summary="Statistics of all models")
    async def all_statistics() -> JSONResponse:
        return JSONResponse(describe.model_statistics(service))

    @router.post(
        "/v2/repository/index",
        responses=answers(ModelState, several=True),
        openapi_extra=_json_body({"ready": {"type": "boolean"}}),
        summary="The models and their state",
    )
    async def index(request: Request) -> JSONResponse:
        body = await read_body(request, max_body_bytes)
        wanted = parse_json(body) if body.strip() else {}
        only_ready = _object(wanted, "the request").get("ready", False)
        return JSONResponse(repository.index(bool(only_ready)))

    @router.post(
        "/v2/repository/models/{name}/load",
        openapi_extra=_json_body({"parameters": {"type": "object", "properties": {"version": {"type": "string"}}}}),
        summary="Serve what the model folder holds now, or a version of it",
        response_class=Response,
    )
    async def load(name: str, request: Request) -> Response:
        body = await read_body(request, max_body_bytes)
        wanted = _object(parse_json(body) if body.strip() else {}, "the request")
        await repository.load(name, _object(wanted.get("parameters", {}), "'parameters'"))
        return Response()

    @router.post(
        "/v2/repository/models/{name}/unload",
        summary="Answer no more requests for a model",
        response_class=Response,
    )
    async def unload(name: str) -> Response:
        await repository.unload(name)
        return Response()

    _add_model_routes(router, service, max_body_bytes)
    _add_shared_memory_routes(router, service, max_body_bytes)
    return router


def _add_shared_memory_routes(router: APIRouter, service: Service, max_body_bytes: int) -> None:
    """Triton's extension_shared_memory, for clients on this machine."""
    shared, regions = service.shared_memory, answers(Region, several=True)
    region = {"key": {"type": "string"}, "offset": {"type": "integer"}, "byte_size": {"type": "integer"}}

    @router.get("/v2/systemsharedmemory/status", responses=regions, summary="All shared memory regions")
    @router.get("/v2/systemsharedmemory/region/{name}/status", responses=regions, summary="A shared memory region")
    async def status(name: str = "") -> JSONResponse:
        keys = ("name", "key", "offset", "byte_size")
        return JSONResponse([{key: getattr(one, key) for key in keys} for one in shared.status(name)])

    @router.post(
        "/v2/systemsharedmemory/region/{name}/register",
        openapi_extra=_json_body(region, ["key", "byte_size"]),
        summary="Register a shared memory region",
        response_class=Response,
    )
    async def register(name: str, request: Request) -> Response:
        wanted = _object(parse_json(await read_body(request, max_body_bytes)), "the request")
        key, offset, size = wanted.get("key"), wanted.get("offset", 0), wanted.get("byte_size")
        if not isinstance(key, str) or type(offset) is not int or type(size) is not int:
            raise InputError("wanted 'key' as text, 'offset' and 'byte_size' as whole numbers")
        shared.register(name, key, offset, size)
        return Response()

    @router.post(
        "/v2/systemsharedmemory/unregister", summary="Let go of all shared memory regions", response_class=Response
    )
    @router.post(
        "/v2/systemsharedmemory/region/{name}/unregister",
        summary="Let go of a shared memory region",
        response_class=Response,
    )
    async def unregister(name: str = "") -> Response:
        shared.unregister(name)
        return Response()


def _add_model_routes(router: APIRouter, service: Service, max_body_bytes: int) -> None:
    """Each route of a model, with and without a version."""

    async def metadata(request: Request) -> Response:
        return JSONResponse(describe.model_metadata(service, *_model_of(request)))

    async def config(request: Request) -> Response:
        return JSONResponse(describe.model_config(service, *_model_of(request)))

    async def statistics(request: Request) -> Response:
        return JSONResponse(describe.model_statistics(service, *_model_of(request)))

    async def ready(request: Request) -> Response:
        service.model(*_model_of(request))
        if not service.ready:
            raise Draining("the server is not ready")
        return Response()

    async def infer(request: Request) -> Response:
        return await _infer(request, service, max_body_bytes)

    routes: tuple[tuple[str, str, str, Callable[..., Any], dict[int | str, dict[str, Any]]], ...] = (
        ("GET", "", "Inputs and outputs of a model", metadata, answers(ModelMetadata)),
        ("GET", "/config", "Configuration of a model", config, answers(ModelConfig)),
        ("GET", "/stats", "Statistics of a model", statistics, answers(Statistics)),
        ("GET", "/ready", "The model takes requests", ready, {}),
        ("POST", "/infer", "Run a model", infer, answers(InferAnswer, also="application/octet-stream")),
    )
    for method, tail, summary, endpoint, responses in routes:
        for middle in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            name = f"{endpoint.__name__}{'_version' if 'version' in middle else ''}"
            extra = _path_parameters(middle) | (_INFER_BODY if tail == "/infer" else {})
            router.add_api_route(
                middle + tail,
                endpoint,
                methods=[method],
                summary=summary,
                name=name,
                operation_id=f"v2_{name}",
                openapi_extra=extra,
                responses=responses,
                response_class=Response,
                response_model=None,
            )


def _path_parameters(path: str) -> dict[str, Any]:
    names = [name for name in ("model", "version") if f"{{{name}}}" in path]
    return {
        "parameters": [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names],
    }


_INFER_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "Open Inference Protocol v2 request; `application/octet-stream` with binary tensors",
        "content": {
            "application/json": {"schema": {"$ref": f"#/components/schemas/{InferBody.__name__}"}},
            "application/octet-stream": BINARY,
        },
    }
}


def _json_body(properties: dict[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    """A body for the page; one without required fields may be left out."""
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"requestBody": {"required": bool(required), "content": {"application/json": {"schema": schema}}}}


def _model_of(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


async def _infer(request: Request, service: Service, max_body_bytes: int) -> Response:
    name, version = _model_of(request)
    service.model(name, version)
    body = await read_body(request, max_body_bytes)
    shared = service.shared_memory
    wanted, header = await off_loop_if_large(len(body), _read_request, body, name, version, request, shared)
    reply = await unless_disconnected(request, service.infer(wanted))
    return _response(request, service, wanted, reply, header)


def _read_request(
    body: bytes, name: str, version: str, request: Request, shared: SharedMemory
) -> tuple[InferRequest, dict[str, Any]]:
    header, binary = _split(body, request.headers.get(HEADER_LENGTH))
    return _request(header, binary, name, version, request, shared), header


def _split(body: bytes, header_length: str | None) -> tuple[dict[str, Any], memoryview]:
    if header_length is None:
        return _object(parse_json(body), "the request"), memoryview(b"")
    length = whole_number(header_length)
    if length is None or length > len(body):
        raise InputError(f"Inference-Header-Content-Length is {header_length!r:.40}, the body has {len(body)} bytes")
    return _object(parse_json(body[:length]), "the request"), memoryview(body)[length:]


def _request(
    header: dict[str, Any], binary: memoryview, name: str, version: str, request: Request, shared: SharedMemory
) -> InferRequest:
    outputs, given_id = _list(header, "outputs"), header.get("id")
    if not isinstance(given_id, str | int | None):
        raise InputError(f"'id' is {given_id!r:.40}; wanted text")
    for part in (*outputs, *_list(header, "inputs")):
        for unsupported in UNSUPPORTED:
            if unsupported in part.get("parameters", {}):
                raise InputError(f"{part.get('name')!r:.80} asks for {unsupported}, which this server does not have")
    parameters = dict(_object(header.get("parameters", {}), "'parameters'"))
    return InferRequest(
        model=name,
        version=version,
        id=str(given_id or request.state.request_id)[:128],
        tensors=_tensors(_list(header, "inputs"), binary, shared),
        outputs=[_text(output, "name") for output in outputs],
        parameters=parameters,
        formats={
            _text(output, "name"): str(form) for output in outputs if (form := output.get("parameters", {}).get(FORMAT))
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
        parameters = _object(one.get("parameters", {}), f"'parameters' of input {name!r}")
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


def _response(
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
        elif spec.name in wanted.formats and spec.datatype == "BYTES":
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
    try:
        text = json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        raise InputError("an output is not finite, which JSON has no words for; ask for binary tensors") from error
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


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} is a JSON {type(value).__name__}; wanted an object")
    return value


def _list(header: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    values = header.get(name, [])
    if not isinstance(values, list):
        raise InputError(f"{name!r} is a JSON {type(values).__name__}; wanted a list of objects")
    for value in values:
        _object(value, f"an element of {name!r}")
        _object(value.get("parameters", {}), f"'parameters' of an element of {name!r}")
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
