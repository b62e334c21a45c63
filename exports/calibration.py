"""Images in, the range of what goes into each linear layer out: the scales of an int8 file.

Scales are symmetric (the same range on both sides of zero), because TensorRT takes no others. Axes: n images, L layers.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from backbones.checkpoints import Backbone
from backbones.network import Heads
from data.datasets import Dataset
from data.decode import DecodeError
from data.errors import InputError
from data.preprocess import Preprocess, center_view
from evaluators.classification import progress_bar
from exports.drift import evenly
from exports.graph import STATIC_LEVELS, Value
from exports.onnx_file import OnnxSpec, fixed_preprocess, make_graph, too_large
from exports.placing import write_file
from exports.weight_writer import WeightWriter
from runtimes.onnx_runtime import session_options
from runtimes.weight_file import weight_file_of

MIN_IMAGES = 32
MAX_IMAGES = 128
KEPT_VALUES = 8192
"""Values of each tensor and image that the ranges are chosen on, spread over the tensor."""
SHARES = np.linspace(1.0, 0.3, 29)
"""Ranges that are tried, as shares of the largest value."""


def calibrate(backbone: Backbone, images: Dataset, fixed_px: tuple[int, int] | None = None) -> dict[str, float]:
    """The range of each layer's input, by the layer's name. Raises InputError where there are too few images."""
    with tempfile.TemporaryDirectory() as folder:
        file, spec = Path(folder) / "graph.onnx", OnnxSpec(fixed_px=fixed_px)
        large = too_large(backbone, Heads(), spec)
        graph, _ = make_graph(backbone, Heads(), spec, weights=WeightWriter(weight_file_of(file)) if large else None)
        names = graph.quantised_inputs
        outputs = [Value(tensor, TensorProto.FLOAT, ()) for tensor in dict.fromkeys(names.values())]
        model = graph.model([Value("pixels", TensorProto.FLOAT, ("N", 3, "H", "W"))], outputs, {})
        for output in model.graph.output:  # of any shape
            output.type.tensor_type.ClearField("shape")
        write_file(model, file)
        session = ort.InferenceSession(str(file), session_options(None), ["CPUExecutionProvider"])
        tensors = [value.name for value in outputs]
        seen = _look(session, tensors, images, fixed_preprocess(backbone.manifest.preprocess, fixed_px))
    ranges = {tensor: best_range(np.concatenate(parts)) for tensor, parts in seen.items()}
    return {layer: ranges[tensor] for layer, tensor in names.items()}


def _look(session: Any, tensors: list[str], images: Dataset, preprocess: Preprocess) -> Mapping[str, list[np.ndarray]]:
    """Some values of each tensor for each image that can be decoded, the largest among them."""
    rows = evenly(len(images), MAX_IMAGES)
    seen: dict[str, list[np.ndarray]] = {tensor: [] for tensor in tensors}
    used = 0
    with progress_bar(f"calibration: {len(rows)} images") as progress:
        for done, row in enumerate(rows, start=1):
            try:
                pixels = center_view(images.image(row), preprocess)[None]
            except DecodeError:
                continue
            used += 1
            for tensor, array in zip(tensors, session.run(tensors, {"pixels": pixels}), strict=True):
                sizes = np.abs(array).ravel()
                step = max(1, len(sizes) // KEPT_VALUES)
                seen[tensor].append(np.append(sizes[::step], sizes.max()))
            progress(done, len(rows))
    if used < MIN_IMAGES:
        raise InputError(f"{images.name}: {used} calibration images; wanted at least {MIN_IMAGES} that can be decoded")
    return seen


def best_range(sizes_n: np.ndarray) -> float:
    """The range whose rounding and clipping lose least in the mean square, of values with these absolute sizes."""
    largest = float(sizes_n.max())
    if largest == 0:
        return 1.0

    def loss(limit: float) -> float:
        step = limit / STATIC_LEVELS
        rounded = np.minimum(np.rint(sizes_n / step), STATIC_LEVELS) * step
        return float(np.square(sizes_n - rounded).mean())

    return float(min((largest * share for share in SHARES), key=loss))
