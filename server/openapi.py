"""What the OpenAPI page says of answers, errors and shared parameters. Documentation only: no answer passes through these classes.

`make reliability` holds the server to them. Read in this order: errors, answers of the routes for people, answers of v2, the page.
"""

from typing import Annotated, Any

from fastapi import FastAPI, Path
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from server.access import Access, needed_on_http
from server.collection_items import NAME, CollectionInfo
from server.evaluations import Evaluation

CollectionName = Annotated[
    str, Path(description="1 to 64 of a-z, 0-9, - and _", json_schema_extra={"pattern": f"^{NAME.pattern}$"})
]
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


class Problem(BaseModel):
    """What every route answers when it cannot do what was asked."""

    error: str
    """One line."""


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status, text in {
        400: "The request or an image cannot be used",
        401: "This server wants a token (authorization: Bearer TOKEN)",
        403: "The token's scope does not cover this",
        404: "Unknown model, collection, item, evaluation or region",
        408: "The rest of the request did not come",
        409: "In the way: other weights, a taken id, a busy slot",
        413: "Larger than this server ever takes",
        429: "The queue is full; see Retry-After",
        500: "The server failed; its log has the details under the request's id",
        503: "The server is about to exit (with --triton-codes: or its queue is full)",
        504: "The deadline passed (X-Timeout-Ms)",
        507: "The collections cannot be read or written",
    }.items()
}


def answers(
    model: Any = None, status: int = 200, also: str | None = None, several: bool = False
) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: JSON of `model`, one of ANSWERS, or of a list of it; and another media type that it may answer in."""
    content: dict[str, Any] = {}
    if model is not None:
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
        content["application/json"] = {"schema": {"type": "array", "items": schema} if several else schema}
    if also is not None:
        content[also] = BINARY
    return {status: {"description": "Done", "content": content}}


class _Whole(BaseModel):
    """Has these fields and no other."""

    model_config = ConfigDict(extra="forbid")


class Embedded(_Whole):
    name: str
    embedding: list[float]


class Embeddings(_Whole):
    dimension: int
    normalized: bool
    items: list[Embedded]


class AttentionMaps(_Whole):
    name: str
    attention: list[list[list[float]]]
    """By head, row, column."""
    mask: list[list[list[int | bool]]]


class Attentions(_Whole):
    heads: int
    grid: list[int]
    """Rows, columns."""
    items: list[AttentionMaps]


class DepthMap(_Whole):
    name: str
    depth: list[list[float]]


class Depths(_Whole):
    unit: str | None
    size: list[int]
    """Rows, columns."""
    items: list[DepthMap]


class ClassMap(_Whole):
    name: str
    classes: list[list[int]]
    """Numbers into the answer's `classes`; 255 where there is none."""


class Segmentations(_Whole):
    classes: list[str]
    items: list[ClassMap]


class CollectionList(_Whole):
    collections: list[CollectionInfo]


class StoredItem(_Whole):
    id: str
    label: str | None
    metadata: dict[str, Any]
    thumbnail: str | None
    """Where its picture is."""


class ItemPage(_Whole):
    items: list[StoredItem]
    next: int | None
    """`after` of the next page; null on the last."""


class Neighbour(_Whole):
    id: str
    label: str | None
    score: float
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Missing, as the thumbnail, of an item that was deleted meanwhile."""
    thumbnail: str | None = None


class Neighbours(_Whole):
    name: str
    neighbours: list[Neighbour]


class SearchResults(_Whole):
    results: list[Neighbours]


class ClassShare(_Whole):
    label: str
    share: float


class Classes(_Whole):
    name: str
    classes: list[ClassShare]


class Classifications(_Whole):
    results: list[Classes]


class Guesses(_Whole):
    items: list[Classes]


class EvaluatorChoice(_Whole):
    name: str
    summary: str
    data: str
    outputs: list[str]
    available: bool
    reason: str | None


class EvaluationList(_Whole):
    evaluations: list[Evaluation]
    evaluators: list[EvaluatorChoice]
    data: list[str]


class ServerMetadata(_Whole):
    name: str
    version: str
    extensions: list[str]


class ServerLive(_Whole):
    live: bool


class ServerReady(_Whole):
    ready: bool


class ModelReady(_Whole):
    name: str
    ready: bool


class TensorMetadata(_Whole):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(_Whole):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelConfig(BaseModel):
    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[dict[str, Any]]
    output: list[dict[str, Any]]
    dynamic_batching: dict[str, int]
    parameters: dict[str, dict[str, str]]


class Duration(_Whole):
    count: int
    ns: int


class BatchStatistics(_Whole):
    batch_size: int
    compute_infer: Duration


class ModelStatistics(_Whole):
    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: dict[str, Duration]
    batch_stats: list[BatchStatistics]


class Statistics(_Whole):
    model_stats: list[ModelStatistics]


class ModelState(_Whole):
    name: str
    version: str
    state: str
    reason: str


class Region(_Whole):
    name: str
    key: str
    offset: int
    byte_size: int


class OutputTensor(_Whole):
    name: str
    datatype: str
    shape: list[int]
    data: list[Any] = Field(default_factory=list)
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferAnswer(_Whole):
    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | int | None = None


class InputTensor(BaseModel):
    """Values in `data`, or behind the JSON with `binary_data_size` among the parameters."""

    name: str = Field(examples=["pixels"])
    datatype: str = Field(examples=["FP32"])
    shape: list[int] = Field(examples=[[1, 3, 32, 32]])
    data: list[Any] = Field(default_factory=list)
    parameters: dict[str, Any] = Field(default_factory=dict)


class WantedOutput(BaseModel):
    name: str = Field(examples=["embedding"])
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferBody(BaseModel):
    id: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[InputTensor]
    outputs: list[WantedOutput] = Field(default_factory=list)


ANSWERS: tuple[Any, ...] = (
    *(Problem, Embeddings, Guesses, Attentions, Depths, Segmentations),
    *(CollectionList, ItemPage, SearchResults, Classifications),
    *(Evaluation, EvaluationList, ServerMetadata, ModelMetadata, ModelConfig, Statistics, ModelState, Region),
    *(ServerLive, ServerReady, ModelReady, InferAnswer, InferBody),
)


TOKEN_SCHEME = {"type": "http", "scheme": "bearer", "description": "A token of the server's token file"}


def describe_answers(app: FastAPI, access: Access, *more: type[BaseModel]) -> None:
    """Put ANSWERS and `more` into the page's schemas, and the tokens that routes want into these.

    Takes out the framework's own 422, which this server answers with 400.
    """
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        page = made()
        schemas = page["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for one in (*ANSWERS, *more):
            schema = TypeAdapter(one).json_schema(ref_template="#/components/schemas/{model}")
            for name, part in {**schema.pop("$defs", {}), one.__name__: schema}.items():
                schemas.setdefault(name, part)
        for methods in page["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        if access.wants_tokens:
            _describe_tokens(page)
        return page

    app.openapi = openapi  # type: ignore[method-assign]


def _describe_tokens(page: dict[str, Any]) -> None:
    """Say of each route whether it wants a token; the scheme has no word for scopes, so those that want admin say so themselves."""
    page["components"]["securitySchemes"] = {"token": TOKEN_SCHEME}
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            needed = needed_on_http(method.upper(), path)
            if needed is not None:
                operation["security"] = [{"token": []}]
            if needed == "admin":
                told = operation.get("description")
                operation["description"] = " ".join(filter(None, [told, "Wants a token of the scope admin."]))
