"""MLServer with a model that computes nothing; run by `python -m benchmarks.serving --part peers` in the peer's own environment.

Arguments: its gRPC, HTTP and metrics port. The model runs in the server's own process: its workers in others would be sent each tensor
once more.
"""

import asyncio
import sys

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Nothing(MLModel):
    """Zeros [N,384] for pixels [N,3,224,224]."""

    async def load(self) -> bool:
        """Nothing to load."""
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One request."""
        rows = len(NumpyCodec.decode_input(payload.inputs[0]))
        output = NumpyCodec.encode_output("embedding", np.zeros((rows, 384), np.float32))
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main(grpc_port: int, http_port: int, metrics_port: int) -> None:
    """Serve until the process is ended."""
    settings = Settings(
        host="127.0.0.1",
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        grpc_max_message_length=64 << 20,
        parallel_workers=0,
        debug=False,
    )
    await MLServer(settings).start([ModelSettings(name="backbone", implementation=Nothing)])


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:4])))
