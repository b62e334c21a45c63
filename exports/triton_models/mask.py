"""Triton model: attention maps in, the patches that hold the top `mass` of each out (request parameter, by default 0.6)."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """`attention` FP32 [N,heads,h,w] to `mask` UINT8 of the same shape."""

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        given = json.loads(request.parameters() or "{}").get("mass", 0.6)
        try:
            mass = float(given)
        except (TypeError, ValueError):
            mass = 0.0
        if not 0 < mass <= 1:
            text = f"parameter 'mass' is {given}; wanted above 0 and up to 1"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG))
        attention = pb_utils.get_input_tensor_by_name(request, "attention").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("mask", top_mass(attention, mass))])


def top_mass(attention, mass):
    """1 on the patches that are left when those with the least attention, together 1 - mass of it, are taken away."""
    flat = attention.reshape(*attention.shape[:2], -1).astype(np.float64)
    order = np.argsort(flat, axis=-1)
    held = np.cumsum(np.take_along_axis(flat, order, -1), -1) / flat.sum(-1, keepdims=True)
    mask = np.zeros(flat.shape, np.uint8)
    np.put_along_axis(mask, order, (held > 1 - mass).astype(np.uint8), -1)
    return mask.reshape(attention.shape)
