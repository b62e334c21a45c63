"""A running server as a runtime: the model `backbone` over KServe v2, gRPC or HTTP (tritonclient)."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from geventhttpclient.response import HTTPParseError
from tritonclient.utils import InferenceServerException

from backbones.checkpoints import Manifest
from data.errors import InputError
from runtimes.connection import Connection
from runtimes.runtime import Runtime, run_in_parts, step_px

MODEL = "backbone"
MAX_MESSAGE_BYTES = 48 * 2**20
"""Larger batches are sent in parts; servers take 64 MB unless told otherwise."""
OPENING_TIMEOUT_S = 10.0
"""A server that is there answers questions about its models at once."""
TIMEOUT_S = 120.0
"""For one part of a batch."""


class RemoteRuntime(Runtime):
    """The network behind `grpc://host:port` or `http://host:port` (with TLS `grpcs://`, `https://`); see `runtimes.connection` for
    tokens and certificates. It must serve `backbone` with our manifest."""

    def __init__(self, address: str) -> None:
        self._connection = Connection(address)
        self.name, self.device, self._address = "remote", "remote", address
        try:
            with self._connection.client(OPENING_TIMEOUT_S) as (client, limits):
                config = client.get_model_config(MODEL, **limits)
                metadata = client.get_model_metadata(MODEL, **limits)
            self.manifest = _manifest(config, address)
            self.precision = config_parameters(config).get("precision", "fp32")
            self._max_rows = _max_batch_size(config) or 1 << 30
            self._shapes = _shapes(metadata)
            self.outputs = tuple(self._shapes)
        except BaseException as error:  # the two clients raise a dozen unrelated types at what is no server of ours
            self.close()
            if isinstance(error, InputError) or not isinstance(error, Exception):
                raise
            raise InputError(f"{address}: no server there that serves the model `backbone` ({_line(error)})") from error

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        self.check_call(pixels_NCHW, outputs)
        names = list(dict.fromkeys(outputs))
        rows = self._rows(pixels_NCHW.shape[2], pixels_NCHW.shape[3], names)
        return run_in_parts(lambda part: self._infer(np.ascontiguousarray(part), names), pixels_NCHW, rows)

    def _rows(self, height: int, width: int, outputs: Sequence[str]) -> int:
        """Images a request, so that neither it nor its reply is larger than a message may be."""
        patches = (height // step_px(self.manifest)) * (width // step_px(self.manifest))
        values = sum(_values(self._shapes[name], patches) for name in outputs)
        row_bytes = 4 * max(3 * height * width, values)
        return max(1, min(self._max_rows, MAX_MESSAGE_BYTES // row_bytes))

    def _infer(self, pixels_NCHW: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        tensor = self._connection.wire.InferInput("pixels", list(pixels_NCHW.shape), "FP32")
        tensor.set_data_from_numpy(pixels_NCHW)
        wanted = [self._connection.wire.InferRequestedOutput(name) for name in names]
        try:
            with self._connection.client(TIMEOUT_S) as (client, limits):
                answer = client.infer(MODEL, [tensor], outputs=wanted, **limits)
        except (InferenceServerException, OSError, HTTPParseError) as error:
            raise InputError(f"{self._address}: the server gave no result ({_line(error)})") from error
        found = {name: answer.as_numpy(name) for name in names}
        if missing := [name for name, array in found.items() if array is None or len(array) != len(pixels_NCHW)]:
            raise InputError(f"{self._address}: the server's reply lacks rows of {', '.join(missing)}")
        return found

    def close(self) -> None:
        self._connection.close()


def _line(error: Exception) -> str:
    """What went wrong, on one line; some of these errors have no words of their own."""
    return " ".join(str(error).split()) or type(error).__name__


def config_parameters(config: Any) -> dict[str, str]:
    """The parameters in a model's configuration: JSON over HTTP, a message over gRPC."""
    if isinstance(config, dict):
        return {name: value.get("string_value", "") for name, value in config.get("parameters", {}).items()}
    return {name: value.string_value for name, value in config.config.parameters.items()}


def _manifest(config: Any, address: str) -> Manifest:
    text = config_parameters(config).get("manifest")
    if not text:
        raise InputError(
            f"{address}: the model `backbone` has no manifest in its parameters, so its preprocessing is unknown"
        )
    try:
        return Manifest.from_json(json.loads(text))
    except json.JSONDecodeError as error:
        raise InputError(f"{address}: the manifest of the model `backbone` is not JSON ({error})") from error


def _shapes(metadata: Any) -> dict[str, tuple[int, ...]]:
    """Each output's shape with its batch axis, -1 where a size varies."""
    if isinstance(metadata, dict):
        return {output["name"]: tuple(output["shape"]) for output in metadata["outputs"]}
    return {output.name: tuple(output.shape) for output in metadata.outputs}


def _values(shape: tuple[int, ...], patches: int) -> int:
    """How many values of an output an image has: those of one place at each of its places, where the shape leaves these open."""
    known = math.prod(size for size in shape[1:] if size > 0)
    return known if all(size > 0 for size in shape[1:]) else known * patches


def _max_batch_size(config: Any) -> int:
    """Images that the server takes in one request; 0 where it does not say."""
    return int(config.get("max_batch_size", 0) if isinstance(config, dict) else config.config.max_batch_size)
