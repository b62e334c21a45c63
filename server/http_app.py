"""All HTTP routes in one application: v2, the routes for people, their documentation, metrics."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from server.access import Access, AccessGuard
from server.docs_page import DOCS_PAGE
from server.errors import ServerError
from server.evaluations import Evaluations
from server.http_body import Guard, error_reply
from server.http_v2 import make_v2_routes
from server.openapi import describe_answers
from server.repository import Repository
from server.rest import Rest, make_rest_routes
from server.rest_collections import VectorItems, make_collection_routes
from server.rest_evaluations import make_evaluation_routes
from server.service import VERSION, Service

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_http_app(
    service: Service, evaluations: Evaluations, repository: Repository, max_body_bytes: int, access: Access
) -> FastAPI:
    """The application of the HTTP port."""
    app = FastAPI(
        title="Dinoscope",
        version=VERSION,
        description="Embeddings, attention, depth, k-NN and evaluations of one self-supervised vision backbone.",
        docs_url=None,
        redoc_url=None,
    )
    rest = Rest(service, max_body_bytes)
    app.include_router(make_rest_routes(rest))
    app.include_router(make_collection_routes(rest))
    app.include_router(make_evaluation_routes(evaluations))
    app.include_router(make_v2_routes(service, repository, max_body_bytes))
    app.add_api_route("/metrics", _metrics(service), include_in_schema=False)
    app.add_api_route("/docs", _docs, include_in_schema=False)
    app.add_api_route("/", _to_docs, include_in_schema=False)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _validation_problem)
    app.add_exception_handler(ValidationError, _validation_problem)
    app.add_middleware(AccessGuard, access=access)
    app.add_middleware(
        Guard, max_bytes=max_body_bytes, admission=service.admission
    )  # the outer one: it names the request first
    describe_answers(app, access, VectorItems)
    return app


def make_metrics_app(service: Service) -> FastAPI:
    """The application of the metrics port."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/metrics", _metrics(service))
    return app


def _metrics(service: Service) -> Callable[[], Awaitable[Response]]:
    async def metrics() -> Response:
        return Response(service.exposition(), media_type=METRICS_TYPE)

    return metrics


async def _docs() -> HTMLResponse:
    return HTMLResponse(DOCS_PAGE)


async def _to_docs() -> RedirectResponse:
    return RedirectResponse("/docs")


async def _http_problem(request: Request, error: Exception) -> Response:
    """Unknown routes and methods, and what the framework made of an error of ours while it read a body."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ServerError):
        return error_reply(error.__cause__, request.state.request_id)
    told = {404: f"there is no route {request.method} {request.url.path:.200}; see /docs"}
    told[405] = f"{request.url.path:.200} does not take {request.method}"
    return JSONResponse({"error": told.get(error.status_code, error.detail)}, error.status_code, error.headers)


async def _validation_problem(request: Request, error: Exception) -> Response:
    """The first complaint of the validator, as one line."""
    assert isinstance(error, RequestValidationError | ValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return JSONResponse(
            {"error": f"the request is not JSON: {first['ctx']['error']}: char {first['loc'][-1]}"}, 400
        )
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    came = "" if first["type"] == "missing" else f" (came: {_shown(first.get('input'))})"
    return JSONResponse({"error": f"{where or 'the request'}: {first['msg']}{came}"}, 400)


def _shown(value: Any) -> str:
    """The framework's own reader takes JSON that is nested nearly as deep as anything that puts it into words."""
    try:
        return f"{value!r:.60}"
    except RecursionError:
        return "what is nested too deep to be shown"
