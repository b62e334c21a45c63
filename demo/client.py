"""The wire: a server's models over KServe v2 (tritonclient), its collections and evaluations over REST (httpx).

A connection is made for each call, so that a restarted server is found again. Whatever goes wrong becomes a gr.Error with words for
visitors. Read in this order: Served, words.
"""

import contextlib
import json
import os
import re
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import httpx
import numpy as np
from geventhttpclient.response import HTTPParseError
from tritonclient.utils import InferenceServerException

from backbones.checkpoints import Manifest
from data.errors import InputError
from data.preprocess import whole_view
from runtimes.connection import CA, CLIENT_CERT, CLIENT_KEY, Connection, split_address
from runtimes.remote import RemoteRuntime, config_parameters
from runtimes.runtime import Runtime, step_px

MODELS = ("attention", "knn", "depth", "segmentation")
TIMEOUT_S = 60.0
READY_TIMEOUT_S = 2.0
READY_FOR_S = 2.0
"""How long an answer about readiness holds for all visitors."""


class Served:
    """One server, as the page asks it."""

    def __init__(self, address: str, rest: str | None = None, name: str = "") -> None:
        """`rest`: where its REST routes are, if `address` is its gRPC port; `name`: what the page calls it. Raises InputError."""
        self.connection = Connection(address)
        scheme, _ = split_address(address)
        self.address, self.name = address.rstrip("/"), name
        self.rest = rest or (self.address if scheme in ("http", "https") else None)
        """None where only gRPC is known."""
        self._lock = threading.Lock()
        self._ready, self._asked = True, -READY_FOR_S

    def models(self) -> set[str]:
        """Those of MODELS that it serves. Raises gr.Error."""
        with self._client() as (client, said):
            return {name for name in MODELS if _is_served(client, name, said)}

    def manifest(self) -> Manifest:
        """The backbone's, with the preprocessing. Raises gr.Error."""
        with self._runtime() as runtime:
            return runtime.manifest

    def parameters(self, model: str) -> dict[str, str]:
        """What a model's configuration says of it: the unit of `depth`, the `classes` of `segmentation`. Raises gr.Error."""
        with self._client() as (client, said):
            return config_parameters(client.get_model_config(model, **said))

    def ask(self, model: str, images: Sequence[bytes], parameters: dict[str, Any]) -> dict[str, np.ndarray]:
        """All outputs of a model for encoded images, a row an image. Raises gr.Error with the server's own words."""
        tensor = self.connection.wire.InferInput("image", [len(images)], "BYTES")
        tensor.set_data_from_numpy(np.array([*images, None], dtype=object)[:-1])
        with self._client() as (client, said):
            answer = client.infer(model, [tensor], parameters=parameters, **said)
            reply = answer.get_response()
        outputs = reply["outputs"] if isinstance(reply, dict) else reply.outputs
        names = [one["name"] if isinstance(one, dict) else one.name for one in outputs]
        return {name: answer.as_numpy(name) for name in names}

    def patches(self, images_HWC: Sequence[np.ndarray], size_px: int) -> np.ndarray:
        """Patch features of whole images, float32 [B, h, w, D]; the size is rounded to whole patches. Raises gr.Error."""
        with self._runtime() as runtime:
            manifest = runtime.manifest
            side = max(1, round(size_px / step_px(manifest))) * step_px(manifest)
            pixels = np.stack([whole_view(image, manifest.preprocess, side) for image in images_HWC])
            patches_BND = runtime.run(pixels, ("patches",))["patches"]
        grid = side // step_px(manifest)
        return patches_BND.reshape(len(pixels), grid, grid, -1)

    def get(self, path: str, **query: Any) -> Any:
        """JSON of a REST route. Raises gr.Error."""
        return self._rest("GET", path, params=query).json()

    def picture(self, path: str) -> bytes:
        """A picture of a REST route. Raises gr.Error."""
        return self._rest("GET", path).content

    def post(self, path: str, **content: Any) -> Any:
        """JSON of a REST route that is sent something; `content` as httpx takes it. Raises gr.Error."""
        return self._rest("POST", path, **content).json()

    def delete(self, path: str) -> None:
        """Take away what a REST route names. Raises gr.Error."""
        self._rest("DELETE", path)

    def is_ready(self) -> bool:
        """Whether it answers and is ready; asked at most every READY_FOR_S, whoever wants to know."""
        with self._lock:
            if time.monotonic() - self._asked > READY_FOR_S:
                try:
                    with self._client(READY_TIMEOUT_S) as (client, said):
                        self._ready = bool(client.is_server_ready(**said))
                except gr.Error:
                    self._ready = False
                self._asked = time.monotonic()
            return self._ready

    @contextlib.contextmanager
    def _client(self, timeout_s: float = TIMEOUT_S) -> Iterator[tuple[Any, dict[str, Any]]]:
        connection = Connection(self.address)
        try:
            with connection.client(timeout_s) as (client, said):
                yield client, said
        except (InferenceServerException, OSError, HTTPParseError, ValueError) as error:
            raise gr.Error(words(error, self.address), print_exception=False) from error
        finally:
            connection.close()

    @contextlib.contextmanager
    def _runtime(self) -> Iterator[Runtime]:
        try:
            with RemoteRuntime(self.address) as runtime:
                yield runtime
        except InputError as error:
            self.models()  # tells better why nothing answers
            raise gr.Error(str(error), print_exception=False) from error

    def _rest(self, method: str, path: str, **content: Any) -> httpx.Response:
        if self.rest is None:
            raise gr.Error(
                f"The server is known by its gRPC address {self.address} only, and this needs REST. "
                "Start the demo with --server http://host:port of the same server.",
                print_exception=False,
            )
        headers = dict(self.connection.headers)
        try:
            trust = _trust(self.rest)
            with httpx.Client(base_url=self.rest, timeout=TIMEOUT_S, verify=trust, headers=headers) as client:
                reply = client.request(method, path, **content)
        except httpx.HTTPError as error:
            raise gr.Error(words(OSError(str(error)), self.rest), print_exception=False) from error
        if reply.is_error:
            raise gr.Error(words(RuntimeError(_reason(reply)), self.rest), print_exception=False)
        return reply


def _is_served(client: Any, model: str, said: dict[str, Any]) -> bool:
    """Asked by its metadata: whether a model is ready, tritonclient answers with no over HTTP whatever went wrong."""
    try:
        client.get_model_metadata(model, **said)
    except InferenceServerException as error:
        if "NOT_FOUND" in str(error.status()) or error.status() == "404":
            return False
        raise
    return True


def _reason(reply: httpx.Response) -> str:
    """The server's own words, as every route of ours has them; a proxy before it may have others."""
    try:
        return str(reply.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"The server answered {reply.status_code} {reply.reason_phrase}."


def _trust(address: str) -> ssl.SSLContext:
    """Authorities and this client's certificate as `runtimes.connection` reads them; none are read for plain HTTP."""
    if not address.startswith("https:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context = ssl.create_default_context(cafile=os.environ.get(CA) or None)
    if os.environ.get(CLIENT_CERT):
        context.load_cert_chain(os.environ[CLIENT_CERT], os.environ.get(CLIENT_KEY))
    return context


def words(error: Exception, address: str) -> str:
    """What a visitor is told: the server's reason, or that it cannot be reached."""
    if isinstance(error, HTTPParseError):
        return f"The server at {address} does not answer in HTTP. Is this its gRPC port?"
    if isinstance(error, ValueError):
        return f"The address {address} cannot be used ({error})."
    message = error.message() if isinstance(error, InferenceServerException) else str(error)
    if isinstance(error, OSError) or "UNAVAILABLE" in str(error) or "shutting down" in str(error):
        return f"The server at {address} does not answer. Start it, then try again."
    return re.sub(r"^image\[0\]: ", "", str(message))


def class_names(parameters: dict[str, str]) -> list[str]:
    """Names of the classes in the parameters of `segmentation`."""
    try:
        return [str(name) for name in json.loads(parameters.get("classes", "[]"))]
    except ValueError:
        return []
