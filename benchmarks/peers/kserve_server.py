"""KServe's SDK with a model that computes nothing; run by `python -m benchmarks.serving --part peers` in the peer's own environment.

Arguments: its gRPC and its HTTP port. The SDK listens on every address of the machine, which cannot be changed.
"""

import sys
from typing import Any

import numpy as np
from kserve import InferOutput, InferResponse, Model, ModelServer


class Nothing(Model):
    """Zeros [N,384] for pixels [N,3,224,224]."""

    def __init__(self) -> None:
        super().__init__("backbone")
        self.ready = True

    async def predict(self, payload: Any, *_: Any, **__: Any) -> InferResponse:
        """One request."""
        rows = len(payload.inputs[0].as_numpy())
        output = InferOutput("embedding", [rows, 384], "FP32")
        output.set_data_from_numpy(np.zeros((rows, 384), np.float32))
        return InferResponse(payload.id, "backbone", [output])


if __name__ == "__main__":
    ModelServer(grpc_port=int(sys.argv[1]), http_port=int(sys.argv[2]), enable_latency_logging=False, workers=1).start(
        [Nothing()]
    )
