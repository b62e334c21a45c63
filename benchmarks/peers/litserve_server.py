"""LitServe with a model that computes nothing; run by `python -m benchmarks.serving --part peers` in the peer's own environment.

Argument: its HTTP port. It has no tensor protocol: a request's body is the tensor's bytes, and so is the reply's.
"""

import sys
from typing import Annotated

import litserve
import numpy as np
from fastapi import Body, Response

WORKERS = 2
"""As many as the real Triton beside it has instances on two cores."""


class Nothing(litserve.LitAPI):
    """Zeros [1,384] for pixels [1,3,224,224]."""

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> np.ndarray:
        """A body -> its tensor."""
        return np.frombuffer(request, np.float32).reshape(1, 3, 224, 224)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """One request."""
        return np.zeros((len(x), 384), np.float32)

    def encode_response(self, output: np.ndarray) -> Response:
        """A tensor -> the reply."""
        return Response(output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    server = litserve.LitServer(Nothing(), accelerator="cpu", workers_per_device=WORKERS)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
