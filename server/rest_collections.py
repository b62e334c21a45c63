"""REST for collections: add, list, delete, search, classify.

Images are embedded by the served `embedding` model through `Service.infer`, so that adding counts, queues and is refused
like any other request.
"""

from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from data.decode import decode_image
from data.errors import InputError
from evaluators.collection_file import check_form, write_collection
from server.collection_items import Item, NewItem, check_name
from server.collections import Collections
from server.file_process import read_apart
from server.http_body import Upload, read_body, whole
from server.json_text import check_json, exactly, may_be_rounded, parse_json, parse_kept, write_json
from server.openapi import (
    BINARY,
    PROBLEMS,
    Classifications,
    CollectionList,
    CollectionName,
    ItemPage,
    SearchResults,
    answers,
)
from server.pictures import thumbnail
from server.repository import binding_of
from server.rest import UPLOAD_BODY, Rest
from server.service import off_loop_if_large

VOTE_TEMPERATURE = 0.07
"""T of the vote exp(cosine / T) (Wu et al. 2018; DINO's k-NN protocol)."""
MAX_PAGE = 1000
STEP_ITEMS = 1000
JSON = "application/json"
K = Annotated[int | None, Query(description="Neighbours of each image; left out: 5")]
Label = Annotated[str, Query(description="Only items with this label; left out or empty: all")]

_ADD_BODY: dict[str, Any] = {
    "requestBody": {
        **UPLOAD_BODY["requestBody"],
        "description": "Image files in a form with the fields `id`, `label`, `metadata` (a JSON object), each once for all "
        "files or once a file; or one image as the body; or JSON with finished embeddings",
        "content": {
            **UPLOAD_BODY["requestBody"]["content"],
            "application/json": {"schema": {"$ref": "#/components/schemas/VectorItems"}},
        },
    }
}


class VectorItem(BaseModel):
    """An item whose embedding the client has."""

    embedding: list[float]
    id: str | None = None
    label: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class VectorItems(BaseModel):
    """Items to add without images."""

    items: list[VectorItem] = Field(min_length=1)


class Added(BaseModel):
    """What was added; it is on disk."""

    ids: list[str]


def make_collection_routes(rest: Rest) -> APIRouter:
    """All routes below /v1/collections."""
    router = APIRouter(prefix="/v1/collections", tags=["collections"], responses=PROBLEMS)
    service = rest.service

    @router.get("", responses=answers(CollectionList), summary="All collections")
    async def listing() -> JSONResponse:
        infos = await service.collections.read(service.collections.infos)
        return JSONResponse({"collections": [vars(info) for info in infos]})

    @router.delete("/{name}", summary="Delete a collection", status_code=204, dependencies=[Depends(whole)])
    async def drop(name: CollectionName) -> Response:
        await service.write(lambda: service.collections.delete(name))
        return Response(status_code=204)

    @router.post("/{name}/items", openapi_extra=_ADD_BODY, summary="Add items", status_code=201, response_model=Added)
    async def add(name: CollectionName, request: Request) -> Any:
        check_name(name)
        is_json = request.headers.get("content-type", "").startswith(JSON)
        new, store = await (_vector_items(rest, request) if is_json else _image_items(rest, request))
        return _added(await service.write(lambda: write_json({"ids": store.add(name, new)})))

    @router.get("/{name}/items", responses=answers(ItemPage), summary="List items in the order of adding")
    async def items(
        name: CollectionName,
        after: Annotated[int, Query(ge=0, lt=1 << 63, description="`next` of the page before")] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
        label: Label = "",
    ) -> Response:
        def page() -> bytes:
            found = service.collections.page(name, after, limit, label or None)
            following = found[-1].sequence if len(found) == limit else None
            return write_json({"items": [_item_json(name, item) for item in found], "next": following})

        return Response(await service.collections.read(page), media_type=JSON)

    @router.delete("/{name}/items/{item_id}", summary="Delete an item", status_code=204, dependencies=[Depends(whole)])
    async def remove(name: CollectionName, item_id: str) -> Response:
        await service.write(lambda: service.collections.delete_item(name, item_id))
        return Response(status_code=204)

    @router.get(
        "/{name}/items/{item_id}/thumbnail",
        responses=answers(also="image/jpeg"),
        summary="The item as a small JPEG",
        response_class=Response,
    )
    async def picture(name: CollectionName, item_id: str) -> Response:
        collections = service.collections
        return Response(await collections.read(lambda: collections.thumbnail(name, item_id)), media_type="image/jpeg")

    @router.get(
        "/{name}/export",
        responses=answers(also="application/octet-stream"),
        summary="The collection as one file",
        response_class=Response,
    )
    async def export(
        name: CollectionName, form: Annotated[str, Query(alias="format", description="npz or parquet")] = "npz"
    ) -> Response:
        check_name(name)
        check_form(form)
        content = await service.convert(lambda: write_collection(service.collections.exported(name), form))
        headers = {"content-disposition": f'attachment; filename="{name}.{form}"'}
        return Response(content, media_type="application/octet-stream", headers=headers)

    @router.post(
        "/{name}/import",
        openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": BINARY}}},
        summary="Add all items of an exported file",
        status_code=201,
        response_model=Added,
    )
    async def take_in(name: CollectionName, request: Request) -> Any:
        check_name(name)
        content = await read_body(request, rest.max_body_bytes)
        store = service.collections
        return _added(await service.convert(lambda: write_json({"ids": store.imported(name, read_apart(content))})))

    @router.post(
        "/{name}/search",
        openapi_extra=UPLOAD_BODY,
        responses=answers(SearchResults),
        summary="The nearest items of each image",
    )
    async def search(name: CollectionName, request: Request, k: K = None, label: Label = "") -> Response:
        upload, neighbours = await _neighbours(rest, request, name, k, label)

        def results() -> bytes:
            details = service.collections.details(name, sorted({one["id"] for row in neighbours for one in row}))
            found = [
                {"name": image, "neighbours": [_item_json(name, details.get(one["id"])) | one for one in row]}
                for image, row in zip(upload.names, neighbours, strict=True)
            ]
            return write_json({"results": found})

        return Response(await service.collections.read(results), media_type=JSON)

    @router.post(
        "/{name}/classify",
        openapi_extra=UPLOAD_BODY,
        responses=answers(Classifications),
        summary="A weighted vote of the nearest labelled items",
    )
    async def classify(name: CollectionName, request: Request, k: K = None, label: Label = "") -> JSONResponse:
        upload, neighbours = await _neighbours(rest, request, name, k, label)
        results = [
            {"name": image, "classes": vote([(one["label"], one["score"]) for one in row])}
            for image, row in zip(upload.names, neighbours, strict=True)
        ]
        return JSONResponse({"results": results})

    return router


def _added(ids: bytes) -> Response:
    # Written where the items were: for a hundred thousand of them the framework would keep the event loop for half a second.
    return Response(ids, 201, media_type=JSON)


async def _neighbours(
    rest: Rest, request: Request, name: str, k: int | None, label: str
) -> tuple[Upload, list[list[dict[str, Any]]]]:
    """id, label and score of the nearest items of each uploaded image, from the served model `knn`."""
    check_name(name)
    upload = await rest.upload(request)
    reply = await rest.run(request, "knn", upload.images, {"collection": name, "k": k, "label": label})
    rows = zip(reply["ids"], reply["labels"], reply["scores"], strict=True)
    found = [
        [
            {"id": item.decode(), "label": label.decode() or None, "score": float(score)}
            for item, label, score in zip(*row, strict=True)
        ]
        for row in rows
    ]
    return upload, found


def vote(neighbours: Sequence[tuple[str | None, float]]) -> list[dict[str, Any]]:
    """Labels with their share of the votes exp(cosine / T), largest first; items without a label do not vote.

    Raises InputError when nobody votes.
    """
    ballots = [(label, score) for label, score in neighbours if label]
    if not ballots:
        raise InputError(
            "none of the nearest items has a label, so there is nothing to vote for; add labels, or raise k"
        )
    best = max(score for _, score in ballots)
    weights: dict[str, float] = {}
    for label, score in ballots:
        weights[label] = weights.get(label, 0.0) + float(np.exp((score - best) / VOTE_TEMPERATURE))
    total = sum(weights.values())
    ranked = sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))
    return [{"label": label, "share": weight / total} for label, weight in ranked]


async def _vector_items(rest: Rest, request: Request) -> tuple[list[NewItem], Collections]:
    body = await read_body(request, rest.max_body_bytes)
    return await off_loop_if_large(len(body), _read_items, body), rest.service.collections


def _validated(value: Any) -> list[VectorItem]:
    """The items, looked at some at a time, between which other threads get their turn. Raises ValidationError."""
    items = value.get("items") if isinstance(value, dict) else None
    if not isinstance(items, list) or len(items) <= STEP_ITEMS:
        return VectorItems.model_validate(value).items
    steps = (items[start : start + STEP_ITEMS] for start in range(0, len(items), STEP_ITEMS))
    try:
        return [one for step in steps for one in VectorItems.model_validate({"items": step}).items]
    except ValidationError:
        return VectorItems.model_validate(value).items  # raises it with the item's number among all


def _read_items(body: bytes) -> list[NewItem]:
    given = _validated(parse_json(body))
    if any(may_be_rounded(one.metadata) for one in given):
        given = _validated(exactly(body))
    for one in given:
        check_json(one.metadata, "'metadata'")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as such
        vectors = [np.array(one.embedding, np.float32) for one in given]
    return [
        NewItem(vector=vector, id=one.id, label=one.label, metadata=one.metadata)
        for one, vector in zip(given, vectors, strict=True)
    ]


async def _image_items(rest: Rest, request: Request) -> tuple[list[NewItem], Collections]:
    """The items, and the collections as the network sees them that made their vectors: another may be served by now."""
    upload = await rest.upload(request)
    ids, labels, metadata = (_spread(upload, name) for name in ("id", "label", "metadata"))
    reply = await rest.run(request, "embedding", upload.images, {})
    store = rest.service.collections.bound_to(binding_of(reply.engine))
    pictures = await rest.service.engine.off_loop(_thumbnails, rest, upload.images)
    items = [
        NewItem(
            vector=reply["embedding"][row],
            id=ids[row],
            label=labels[row],
            metadata=_metadata(metadata[row], upload.names[row]),
            thumbnail=pictures[row],
        )
        for row in range(len(upload.images))
    ]
    return items, store


def _thumbnails(rest: Rest, images: Sequence[bytes]) -> list[bytes]:
    return [thumbnail(decode_image(image, rest.service.engine.spec.limits)) for image in images]


def _spread(upload: Upload, name: str) -> Sequence[str | None]:
    """A form field for each image: one given once counts for all, but an id cannot."""
    values, n = upload.fields.get(name, ()), len(upload.images)
    if not values:
        return [None] * n
    if len(values) == n:
        return values
    if len(values) == 1 and name != "id":
        return list(values) * n
    raise InputError(
        f"field {name!r} came {len(values)} times for {n} images; wanted {'once or ' * (name != 'id')}{n} times"
    )


def _metadata(text: str | None, file_name: str) -> dict[str, Any]:
    if text is None:
        return {"file": file_name}
    value = parse_kept(text.encode())
    if not isinstance(value, dict):
        raise InputError(f"field 'metadata' is a JSON {type(value).__name__}; wanted an object")
    check_json(value, "field 'metadata'")
    return value


def _item_json(collection: str, item: Item | None) -> dict[str, Any]:
    """An item as JSON; one that was deleted between search and look-up has only what the search knew."""
    if item is None:
        return {}
    path = f"/v1/collections/{collection}/items/{quote(item.id, safe=':')}/thumbnail"
    link = path if item.has_thumbnail else None
    return {"id": item.id, "label": item.label, "metadata": item.metadata, "thumbnail": link}
