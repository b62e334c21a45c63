"""One call for every wire, so that a test states once what all of them must do."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from server.run import Addresses

STATUS = {
    "invalid": ("StatusCode.INVALID_ARGUMENT", "400"),
    "not found": ("StatusCode.NOT_FOUND", "404"),
    "conflict": ("StatusCode.FAILED_PRECONDITION", "409"),
    "too large": ("StatusCode.RESOURCE_EXHAUSTED", "413"),
    "overloaded": ("StatusCode.RESOURCE_EXHAUSTED", "429"),
    "late": ("StatusCode.DEADLINE_EXCEEDED", "504"),
}
"""Kind of refusal: its gRPC code, its HTTP status."""


class Refused(Exception):
    """What the server answered instead of tensors: kind of refusal, and its line."""

    def __init__(self, kind: str, line: str) -> None:
        super().__init__(f"{kind}: {line}")
        self.kind, self.line = kind, line


def refusal(status: str, line: str, wire: int) -> Refused:
    kinds = [kind for kind, both in STATUS.items() if both[wire] == status]
    return Refused("too large" if "too large" in kinds else kinds[0] if kinds else status, line)


class TritonWire:
    """A `tritonclient`, gRPC or HTTP with binary tensors."""

    def __init__(self, module: Any, address: str, wire: int) -> None:
        self.module, self.wire = module, wire
        self.client = module.InferenceServerClient(address)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
        version: str = "",
    ) -> dict[str, np.ndarray]:
        tensors = []
        for name, array in inputs.items():
            datatype = "BYTES" if array.dtype == object else np_to_triton_dtype(array.dtype)
            tensors.append(self.module.InferInput(name, list(array.shape), datatype))
            tensors[-1].set_data_from_numpy(array)
        wanted = [self.module.InferRequestedOutput(name) for name in outputs] or None
        given = dict(parameters or {})
        timeout = given.pop("timeout", None)
        try:
            answer = self.client.infer(model, tensors, version, wanted, timeout=timeout, parameters=given or None)
        except InferenceServerException as error:
            raise refusal(str(error.status()), error.message(), self.wire) from error
        reply = answer.get_response()
        names = [one["name"] for one in reply["outputs"]] if self.wire else [one.name for one in reply.outputs]
        return {name: answer.as_numpy(name) for name in names}

    def close(self) -> None:
        self.client.close()


class JsonWire:
    """KServe v2 over HTTP with plain JSON, as a program without any client library sends it."""

    def __init__(self, address: str) -> None:
        self.client = httpx.Client(base_url=address, timeout=60)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
        version: str = "",
    ) -> dict[str, np.ndarray]:
        body: dict[str, Any] = {"inputs": [self._tensor(name, array) for name, array in inputs.items()]}
        body |= {"outputs": [{"name": name} for name in outputs]} if outputs else {}
        body |= {"parameters": dict(parameters)} if parameters else {}
        path = f"/v2/models/{model}{f'/versions/{version}' if version else ''}/infer"
        answer = self.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        if answer.status_code != 200:
            raise refusal(str(answer.status_code), answer.json()["error"], 1)
        return {one["name"]: self._array(one) for one in answer.json()["outputs"]}

    def _tensor(self, name: str, array: np.ndarray) -> dict[str, Any]:
        shape = list(array.shape)
        if array.dtype != object:
            return {
                "name": name,
                "shape": shape,
                "datatype": np_to_triton_dtype(array.dtype),
                "data": array.ravel().tolist(),
            }
        texts = [base64.b64encode(element).decode() for element in array.flat]
        parameters = {"content_type": "base64"}
        return {"name": name, "shape": shape, "datatype": "BYTES", "data": texts, "parameters": parameters}

    def _array(self, tensor: Mapping[str, Any]) -> np.ndarray:
        if tensor["datatype"] == "BYTES":
            flat = np.array([text.encode() for text in tensor["data"]], object)
        else:
            flat = np.array(
                tensor["data"], {"FP32": np.float32, "FP16": np.float16, "UINT8": np.uint8}[tensor["datatype"]]
            )
        return flat.reshape(tensor["shape"])

    def close(self) -> None:
        self.client.close()


def open_wire(name: str, addresses: Addresses) -> TritonWire | JsonWire:
    """A wire by its name: grpc, http, json."""
    if name == "grpc":
        return TritonWire(grpc_client, addresses.grpc, 0)
    return (
        TritonWire(http_client, addresses.http.removeprefix("http://"), 1)
        if name == "http"
        else JsonWire(addresses.http)
    )


def images(*files: bytes) -> dict[str, np.ndarray]:
    """Encoded images as the input `image`."""
    array = np.empty(len(files), object)
    array[:] = files
    return {"image": array}


def refused(call, *args, **kwargs):
    """The kind of error and its line, of a call that must be refused by one line that tells nothing of the inside."""
    with pytest.raises(Refused) as caught:
        call(*args, **kwargs)
    line = caught.value.line
    assert "\n" not in line
    assert "Traceback" not in line
    assert "the server failed" not in line
    return caught.value.kind, line
