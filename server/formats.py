"""Outputs in a smaller form, where a request asks for one: FP16, UINT8 or PNG instead of FP32, or the largest numbers of a row as text.

An output's parameter `format` chooses, or Triton's `classification` (its clients' `class_count`), which is how many of a row. What is
scaled to whole shades carries the parameter `scale`, a JSON list of [low, high] of every map, in the order of the maps:
value = low + shade / largest shade * (high - low). Axes: N images, any further maps each, H and W of a map, C classes, k of them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from data.errors import InputError
from server.errors import EngineFailed
from server.tensors import TensorSpec, object_array

FORMAT = "format"
"""Name of the output parameter."""
SCALE = "scale"
TOP = "classification"
"""Name of Triton's parameter, and of its form."""
LARGEST_FP16 = 65504.0


@dataclass(slots=True)
class Formatted:
    """An output as it goes out."""

    spec: TensorSpec
    array: np.ndarray
    scale: str | None = None


def asked_form(name: str, parameters: Mapping[str, Any]) -> str:
    """The form that this output's parameters ask for, unchecked; empty: its own. Raises InputError."""
    count = parameters.get(TOP)
    if count is None:
        return str(parameters.get(FORMAT) or "")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(
            f"output {name!r:.80} has the parameter {TOP} {count!r:.40}; wanted how many classes, at least 1"
        )
    return f"{TOP}:{count}"


def check_format(spec: TensorSpec, given: str) -> str:
    """The format's name in small letters. Raises InputError for one that this output has not."""
    form, _, count = given.lower().partition(":")
    if form not in spec.formats or (form == TOP) is not bool(re.fullmatch("[1-9][0-9]{0,17}", count)):
        known = f"it has {', '.join(spec.formats)}" if spec.formats else "it has none but its own"
        raise InputError(f"output {spec.name!r} has no format {given!r:.40}; {known} ({spec.datatype} without one)")
    return given.lower()


def formatted(spec: TensorSpec, array: np.ndarray, form: str) -> Formatted:
    """An output [N, ...] in a format that it has. Raises InputError where its values do not fit."""
    if form.startswith(TOP):
        count = int(form.partition(":")[2])
        return Formatted(replace(spec, datatype="BYTES", formats=(TOP,)), _largest(spec, array, count))
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
    return Formatted(replace(spec, datatype="BYTES", formats=("png",)), files, scale)


def _largest(spec: TensorSpec, array_NC: np.ndarray, count: int) -> np.ndarray:
    """The largest numbers of each row, the largest first, as VALUE:CLASS or VALUE:CLASS:NAME (Triton, extension_classification)."""
    order_Nk = np.argsort(-array_NC, axis=1, kind="stable")[:, :count]
    names = [f"{index}:{name}" for index, name in enumerate(spec.classes)] or list(map(str, range(array_NC.shape[1])))
    texts = [
        f"{row[index]:f}:{names[index]}".encode()
        for row, order in zip(array_NC, order_Nk, strict=True)
        for index in order
    ]
    return object_array(texts, order_Nk.shape)


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
