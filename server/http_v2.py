"""KServe v2 over HTTP: the REST twins of the RPCs, with JSON or binary tensors, plain or compressed."""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from data.errors import InputError
from server import describe
from server.errors import Draining
from server.http_body import read_body, unless_disconnected, whole
from server.http_messages import json_object, read_request, reply_response
from server.json_text import parse_json
from server.openapi import (
    BINARY,
    PROBLEMS,
    InferAnswer,
    InferBody,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    ModelState,
    Region,
    ServerLive,
    ServerMetadata,
    ServerReady,
    Statistics,
    answers,
)
from server.repository import Repository
from server.requests import InferReply
from server.service import Service, off_loop_if_large

_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "Not yet, or no longer"}}


def make_v2_routes(service: Service, repository: Repository, max_body_bytes: int) -> APIRouter:
    """All routes below /v2."""
    router = APIRouter(tags=["KServe v2"], responses=PROBLEMS)

    @router.get("/v2", responses=answers(ServerMetadata), summary="Server name, version, extensions")
    async def server_metadata() -> JSONResponse:
        return JSONResponse(describe.server_metadata())

    # Triton's clients read the status alone, those of KServe the body.
    @router.head("/v2/health/live", include_in_schema=False)
    @router.get("/v2/health/live", responses=answers(ServerLive), summary="The process answers")
    async def live() -> JSONResponse:
        return JSONResponse({"live": True})

    @router.head("/v2/health/ready", include_in_schema=False)
    @router.get("/v2/health/ready", responses=answers(ServerReady) | _NOT_READY, summary="Requests are taken")
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

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
        only_ready = json_object(wanted, "the request").get("ready") or False
        if not isinstance(only_ready, bool):
            raise InputError(f"'ready' is {only_ready!r:.40}; wanted true or false")
        return JSONResponse(repository.index(only_ready))

    @router.post(
        "/v2/repository/models/{name}/load",
        openapi_extra=_json_body({"parameters": {"type": "object", "properties": {"version": {"type": "string"}}}}),
        summary="Serve what the model folder holds now, or a version of it",
        response_class=Response,
    )
    async def load(name: str, request: Request) -> Response:
        body = await read_body(request, max_body_bytes)
        wanted = json_object(parse_json(body) if body.strip() else {}, "the request")
        given = wanted.get("parameters")
        await repository.load(name, json_object({} if given is None else given, "'parameters'"))
        return Response()

    @router.post(
        "/v2/repository/models/{name}/unload",
        summary="Answer no more requests for a model",
        response_class=Response,
        dependencies=[Depends(whole)],
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
        wanted = json_object(parse_json(await read_body(request, max_body_bytes)), "the request")
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
        model = service.model(*_model_of(request))
        if not service.ready:
            raise Draining("the server is not ready")
        return JSONResponse({"name": model.name, "ready": True})

    async def infer(request: Request) -> Response:
        return await _infer(request, service, max_body_bytes)

    routes: tuple[tuple[str, str, str, Callable[..., Any], dict[int | str, dict[str, Any]]], ...] = (
        ("GET", "", "Inputs and outputs of a model", metadata, answers(ModelMetadata)),
        ("GET", "/config", "Configuration of a model", config, answers(ModelConfig)),
        ("GET", "/stats", "Statistics of a model", statistics, answers(Statistics)),
        ("GET", "/ready", "The model takes requests", ready, answers(ModelReady)),
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
    model = service.model(name, version)
    body = await read_body(request, max_body_bytes)
    shared = service.shared_memory
    wanted, header = await off_loop_if_large(len(body), read_request, body, model, version, request, shared)

    async def write(reply: InferReply) -> Response:
        return await off_loop_if_large(reply.nbytes, reply_response, request, service, wanted, reply, header)

    return await unless_disconnected(request, service.infer(wanted, write))
