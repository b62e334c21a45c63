"""Outputs in a smaller form, where a request asks for one: FP16, UINT8 or PNG instead of FP32.

An output's parameter `format` chooses. What is scaled to whole shades carries the parameter `scale`, a JSON list of [low, high] of every
map, in the order of the maps: value = low + shade / largest shade * (high - low). Axes: N images, any further maps each, H and W of a map.
"""

import json
from dataclasses import dataclass, replace

import cv2
import numpy as np

from data.errors import InputError
from server.errors import EngineFailed
from server.tensors import TensorSpec, object_array

FORMAT = "format"
"""Name of the output parameter."""
SCALE = "scale"
LARGEST_FP16 = 65504.0


@dataclass(slots=True)
class Formatted:
    """An output as it goes out."""

    spec: TensorSpec
    array: np.ndarray
    scale: str | None = None


def check_format(spec: TensorSpec, given: str) -> str:
    """The format's name in small letters. Raises InputError for one that this output has not."""
    if given.lower() not in spec.formats:
        known = f"it has {', '.join(spec.formats)}" if spec.formats else "it has none but its own"
        raise InputError(f"output {spec.name!r} has no format {given!r:.40}; {known} ({spec.datatype} without one)")
    return given.lower()


def formatted(spec: TensorSpec, array: np.ndarray, form: str) -> Formatted:
    """An output [N, ...] in a format that it has. Raises InputError where its values do not fit."""
    if form == "fp16":
        if np.abs(array).max(initial=0) > LARGEST_FP16:
            raise InputError(f"output {spec.name!r} holds values beyond FP16's {LARGEST_FP16:g}; ask for FP32")
        return Formatted(replace(spec, datatype="FP16"), array.astype(np.float16))
    if array.dtype.kind in "iu":
        shades, scale = _whole(spec, array, form), None
    else:
        shades, scale = _scaled(array, np.uint16 if form == "png" and spec.name == "depth" else np.uint8)
    if form == "uint8":
        return Formatted(replace(spec, datatype="UINT8"), shades, scale)
    maps = shades.reshape(-1, *shades.shape[-2:])
    files = object_array([_png(one) for one in maps], shades.shape[:-2])
    return Formatted(replace(spec, datatype="BYTES"), files, scale)


def _whole(spec: TensorSpec, array: np.ndarray, form: str) -> np.ndarray:
    """Class numbers as they are, in the smallest type that holds them."""
    largest = int(array.max(initial=0))
    if largest <= 255:
        return array.astype(np.uint8)
    if form == "uint8":
        raise InputError(f"output {spec.name!r} holds class {largest}, and UINT8 ends at 255; ask for PNG or INT32")
    return array.astype(np.uint16)


def _scaled(array: np.ndarray, kind: type[np.unsignedinteger]) -> tuple[np.ndarray, str]:
    """Each map from its lowest value to its highest as shades, and these values."""
    low, high = (bound(axis=(-2, -1), keepdims=True) for bound in (array.min, array.max))
    largest = np.iinfo(kind).max
    spread = np.where(high > low, high - low, 1)
    shades = np.rint((array - low) / spread * largest).astype(kind)
    pairs = np.stack([low.ravel(), high.ravel()], axis=1)
    return shades, json.dumps([[float(f"{value:.9g}") for value in pair] for pair in pairs], separators=(",", ":"))


def _png(shades_HW: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", np.ascontiguousarray(shades_HW), [cv2.IMWRITE_PNG_COMPRESSION, 3])
    if not done:
        raise EngineFailed("OpenCV could not write a .png file")
    return bytes(data)
