"""Triton model: embeddings as they are, or scaled to length 1 where the request parameter `normalize` says so."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """`raw` FP32 [N,D] to `embedding` FP32 [N,D]."""

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        rows_ND = pb_utils.get_input_tensor_by_name(request, "raw").as_numpy()
        if json.loads(request.parameters() or "{}").get("normalize") in (True, "true", 1, "1"):
            length = np.linalg.norm(rows_ND, axis=1, keepdims=True)
            rows_ND = (rows_ND / np.maximum(length, 1e-12)).astype(np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("embedding", rows_ND)])
