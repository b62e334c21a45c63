"""Triton model: encoded images in, views out, as `center` or `whole` as the configuration says.

Runs inside Triton's python backend; beside it lies the very code that decodes and resizes elsewhere (folder `data`).
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """`image` BYTES [N] to `pixels` FP32 [N,3,S,S]; request parameter `size` for whole views."""

    def initialize(self, args):
        sys.path.insert(0, str(Path(args["model_repository"]) / args["model_version"]))
        from data.decode import decode_image
        from data.errors import InputError
        from data.preprocess import Preprocess, center_view, whole_view

        cv2.setNumThreads(1)
        parameters = json.loads(args["model_config"])["parameters"]
        self.view = parameters["view"]["string_value"]
        self.step_px = int(parameters["step_px"]["string_value"])
        self.max_size_px = int(parameters["max_size_px"]["string_value"])
        self.preprocess = Preprocess.from_json(json.loads(parameters["preprocess"]["string_value"]))
        self.decode, self.center_view, self.whole_view, self.bad = decode_image, center_view, whole_view, InputError

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        try:
            images = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
            size_px = self._size(json.loads(request.parameters() or "{}"))
            views = np.stack([self._make_view(row, image, size_px) for row, image in enumerate(images)])
            return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", views)])
        except self.bad as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))

    def _size(self, parameters):
        given = parameters.get("size")
        if given is None or self.view == "center":
            return None
        try:
            side = int(given)
        except (TypeError, ValueError):
            side = 0
        if side < self.step_px or side % self.step_px or side > self.max_size_px:
            raise self.bad(
                f"parameter 'size' is {given}; wanted a multiple of {self.step_px} up to {self.max_size_px} pixels"
            )
        return side

    def _make_view(self, row, image, size_px):
        try:
            decoded = self.decode(bytes(image))
            if self.view == "center":
                return self.center_view(decoded, self.preprocess)
            return self.whole_view(decoded, self.preprocess, size_px)
        except self.bad as error:
            raise self.bad(f"image[{row}]: {error}") from error
