"""A running server as a runtime: the model `backbone` over KServe v2, gRPC or HTTP (tritonclient)."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from backbones.checkpoints import Manifest
from data.errors import InputError
from runtimes.runtime import Runtime

REMOTE_SCHEMES = ("grpc://", "http://")
MODEL = "backbone"
MAX_MESSAGE_BYTES = 48 * 2**20
"""Larger batches are sent in parts; servers take 64 MB unless told otherwise."""
TIMEOUT_S = 120.0


class RemoteRuntime(Runtime):
    """The network behind `grpc://host:port` or `http://host:port`. It must serve `backbone` with our manifest."""

    def __init__(self, address: str) -> None:
        scheme, _, where = address.partition("://")
        where = where.rstrip("/")
        if not where or "/" in where:
            raise InputError(f"{address}: wanted grpc://host:port or http://host:port")
        self.name, self.device, self._address = "remote", "remote", address
        self._wire: Any = grpc_client if scheme == "grpc" else http_client
        timeouts = {} if scheme == "grpc" else {"connection_timeout": TIMEOUT_S, "network_timeout": TIMEOUT_S}
        self._client = self._wire.InferenceServerClient(where, **timeouts)
        try:
            config = self._client.get_model_config(MODEL)
            metadata = self._client.get_model_metadata(MODEL)
        except (InferenceServerException, OSError) as error:
            self.close()
            raise InputError(f"{address}: no server there that serves the model `backbone` ({error})") from error
        self.manifest = _manifest(config, address)
        self.outputs = _output_names(metadata)

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        self.check_call(pixels_NCHW, outputs)
        rows = max(1, MAX_MESSAGE_BYTES // pixels_NCHW[0].nbytes)
        parts = [
            self._infer(np.ascontiguousarray(pixels_NCHW[start : start + rows]), outputs)
            for start in range(0, len(pixels_NCHW), rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in outputs}

    def _infer(self, pixels_NCHW: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        tensor = self._wire.InferInput("pixels", list(pixels_NCHW.shape), "FP32")
        tensor.set_data_from_numpy(pixels_NCHW)
        wanted = [self._wire.InferRequestedOutput(name) for name in outputs]
        try:
            answer = self._client.infer(MODEL, [tensor], outputs=wanted)
        except (InferenceServerException, OSError) as error:
            raise InputError(f"{self._address}: the server did not answer ({error})") from error
        return {name: answer.as_numpy(name) for name in outputs}

    def close(self) -> None:
        self._client.close()


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


def _output_names(metadata: Any) -> tuple[str, ...]:
    if isinstance(metadata, dict):
        return tuple(output["name"] for output in metadata["outputs"])
    return tuple(output.name for output in metadata.outputs)
