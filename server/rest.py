"""REST for people: images as uploads, JSON or pictures back. The same models through the same `Service.infer`.

Read in this order: the shared dependencies, embeddings, classification, attention, depth, segmentation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from data.decode import decode_image
from data.errors import InputError
from evaluators.attention_maps import top_mass
from server.errors import EngineFailed
from server.http_body import Upload, read_upload, unless_disconnected
from server.http_messages import timeout_of
from server.json_text import write_json
from server.openapi import PROBLEMS, Attentions, Depths, Embeddings, Guesses, Segmentations, answers
from server.pictures import attention_overlay, depth_picture
from server.requests import InferReply, InferRequest
from server.service import Service, off_loop_if_large
from server.tensors import Tensor, object_array

Format = Literal["json", "png"]

UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "Image files (JPEG, PNG, WebP, BMP, TIFF) in a form, or one image as the body",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


@dataclass(frozen=True)
class Rest:
    """What the routes for people need."""

    service: Service
    max_body_bytes: int

    async def upload(self, request: Request) -> Upload:
        """The images of a request."""
        return await read_upload(request, self.max_body_bytes)

    async def run(
        self,
        request: Request,
        model: str,
        images: Sequence[bytes],
        parameters: dict[str, Any],
        outputs: Sequence[str] = (),
    ) -> InferReply:
        """One model over the images, dropped when the caller leaves. Parameters that are None are left out.

        Raises EngineFailed for an output that is not finite: neither JSON nor a picture has a way to say so.
        """
        wanted = InferRequest(
            model=model,
            tensors=[Tensor("image", "BYTES", object_array(images))],
            outputs=outputs,
            parameters={name: value for name, value in parameters.items() if value is not None},
            id=request.state.request_id,
            protocol="rest",
            timeout_s=timeout_of(request),
        )
        return await unless_disconnected(request, self.service.infer(wanted, _finite))


async def _finite(reply: InferReply) -> InferReply:
    for spec, array in reply.outputs:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise EngineFailed(f"output {spec.name!r} is not finite")
    return reply


async def _json(reply: InferReply, value: dict[str, Any]) -> Response:
    """What was made of a reply, as JSON."""
    return Response(await off_loop_if_large(reply.nbytes, write_json, value), media_type="application/json")


def wants_png(request: Request, given: Format | None) -> bool:
    """The query parameter decides; without it the Accept header does."""
    return given == "png" if given else "image/png" in request.headers.get("accept", "")


def make_rest_routes(rest: Rest) -> APIRouter:
    """The routes that run one model on uploaded images."""
    router = APIRouter(prefix="/v1", tags=["images"], responses=PROBLEMS)

    @router.post("/embeddings", openapi_extra=UPLOAD_BODY, responses=answers(Embeddings), summary="One vector an image")
    async def embeddings(
        request: Request, normalize: Annotated[bool, Query(description="Scale to length 1")] = False
    ) -> Response:
        upload = await rest.upload(request)
        reply = await rest.run(request, "embedding", upload.images, {"normalize": normalize})
        items = [{"name": n, "embedding": vector} for n, vector in zip(upload.names, reply["embedding"], strict=True)]
        return await _json(reply, {"dimension": reply.engine.width, "normalized": normalize, "items": items})

    @router.post(
        "/classification",
        openapi_extra=UPLOAD_BODY,
        responses=answers(Guesses),
        summary="The likeliest classes, by a linear head",
    )
    async def classification(
        request: Request, k: Annotated[int, Query(ge=1, description="So many classes, likeliest first")] = 5
    ) -> Response:
        rest.service.model("classification")
        upload, labels = await rest.upload(request), rest.service.labels
        reply = await rest.run(request, "classification", upload.images, {})
        items = [
            {"name": name, "classes": likeliest(logits, labels, k)}
            for name, logits in zip(upload.names, reply["logits"], strict=True)
        ]
        return await _json(reply, {"items": items})

    @router.post(
        "/attention",
        openapi_extra=UPLOAD_BODY,
        responses=answers(Attentions, also="image/png"),
        summary="Attention maps, or an overlay",
    )
    async def attention(
        request: Request,
        mass: Annotated[
            float | None, Query(description="Share of attention that the mask holds; JSON default 0.6")
        ] = None,
        size: Annotated[int | None, Query(description="Side the image is squashed to")] = None,
        head: Annotated[int | None, Query(description="One head for the picture; the mean of all without it")] = None,
        format: Annotated[Format | None, Query(description="Overrides the Accept header")] = None,
    ) -> Response:
        rest.service.model("attention")
        upload = await rest.upload(request)
        png = wants_png(request, format)
        images = upload.images[:1] if png else upload.images
        _check_head(rest.service, head)
        reply = await rest.run(request, "attention", images, {"mass": mass, "size": size})
        if png:
            return await _overlay(rest.service, images[0], reply, head, mass)
        maps, masks = reply["attention"], reply["mask"]
        if head is not None:
            maps, masks = maps[:, head : head + 1], masks[:, head : head + 1]
        items = [{"name": name, "attention": maps[row], "mask": masks[row]} for row, name in enumerate(upload.names)]
        return await _json(reply, {"heads": maps.shape[1], "grid": list(maps.shape[2:]), "items": items})

    @router.post(
        "/depth",
        openapi_extra=UPLOAD_BODY,
        responses=answers(Depths, also="image/png"),
        summary="Depth maps, or a picture",
    )
    async def depth(
        request: Request,
        size: Annotated[int | None, Query(description="Side the image is squashed to")] = None,
        format: Annotated[Format | None, Query(description="Overrides the Accept header")] = None,
    ) -> Response:
        rest.service.model("depth")
        upload = await rest.upload(request)
        png = wants_png(request, format)
        images, unit = upload.images[:1] if png else upload.images, rest.service.depth_unit
        reply = await rest.run(request, "depth", images, {"size": size})
        if png:
            picture = await rest.service.engine.off_loop(_depth_png, rest.service, images[0], reply["depth"][0])
            return Response(picture, media_type="image/png")
        maps = reply["depth"]
        items = [{"name": name, "depth": one} for name, one in zip(upload.names, maps, strict=True)]
        return await _json(reply, {"unit": unit, "size": list(maps.shape[1:]), "items": items})

    @router.post(
        "/segmentation", openapi_extra=UPLOAD_BODY, responses=answers(Segmentations), summary="Class of every pixel"
    )
    async def segmentation(
        request: Request, size: Annotated[int | None, Query(description="Side the image is squashed to")] = None
    ) -> Response:
        rest.service.model("segmentation")
        upload, classes = await rest.upload(request), rest.service.classes
        reply = await rest.run(request, "segmentation", upload.images, {"size": size})
        items = [{"name": n, "classes": c} for n, c in zip(upload.names, reply["classes"], strict=True)]
        return await _json(reply, {"classes": list(classes), "items": items})

    return router


def likeliest(logits_C: np.ndarray, labels: Sequence[str], k: int) -> list[dict[str, Any]]:
    """The `k` classes of the highest softmax, highest first, equals by index; a class without a name goes by its index."""
    share_C = np.exp(logits_C - logits_C.max())
    share_C /= share_C.sum()
    order = np.argsort(-share_C, kind="stable")[:k]
    named = dict(enumerate(labels))
    return [{"label": named.get(index, str(index)), "share": float(share_C[index])} for index in order.tolist()]


def _check_head(service: Service, head: int | None) -> None:
    heads = service.engine.shapes["attention"][1]
    if head is not None and not 0 <= head < heads:
        raise InputError(f"parameter 'head' is {head}; this backbone has the heads 0 to {heads - 1}")


async def _overlay(service: Service, image: bytes, reply: InferReply, head: int | None, mass: float | None) -> Response:
    maps, masks = reply["attention"][0], reply["mask"][0]

    def draw() -> bytes:
        chosen = maps.mean(axis=0) if head is None else maps[head]
        mask = None
        if mass is not None:
            mask = top_mass(chosen[None, None], mass)[0, 0] if head is None else masks[head]
        return attention_overlay(decode_image(image, service.engine.spec.limits), chosen, mask)

    return Response(await service.engine.off_loop(draw), media_type="image/png")


def _depth_png(service: Service, image: bytes, depth_hw: Any) -> bytes:
    return depth_picture(decode_image(image, service.engine.spec.limits), depth_hw)
