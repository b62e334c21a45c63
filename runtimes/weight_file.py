"""NAME.onnx.data: the weights of a network that are too many for one .onnx, which then names them by place and size.

A message of protobuf, which an .onnx is, holds 2 GB. ONNX Runtime maps the second file into memory, so that weights are read from it as
they are needed. Its first page says which export it belongs to; the .onnx says the same.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from backbones.checkpoints import CheckpointError

ENDING = ".data"
PAGE_BYTES = 4096
"""Weights begin on pages of this size, the first behind the stamp, so that they can be mapped one by one."""
STAMP = b"dinoscope weights "
"""What the file begins with; the hash of all that comes behind the first page follows, in hexadecimal digits."""
FOLDER_ENTRY = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's session entry that says where the second file lies."""
_FILE_NAME = re.compile(r"[^/\\\0]+")


def weight_file_of(path: Path) -> Path:
    """Where the weights of an .onnx go that are too many for it."""
    return path.with_name(path.name + ENDING)


def outside(model: onnx.ModelProto) -> Iterator[dict[str, str]]:
    """For each weight that lies in another file: `location`, `offset` and `length`."""
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield {entry.key: entry.value for entry in tensor.external_data}


def check_weight_file(model: onnx.ModelProto, export: dict[str, Any], path: Path) -> bool:
    """Whether `model`, read from `path`, has weights in another file. Raises CheckpointError unless that is the one written with it."""
    places = list(outside(model))
    if not places:
        return False
    names = {place.get("location", "") for place in places}
    name = next(iter(names))
    if len(names) > 1 or not _FILE_NAME.fullmatch(name) or name in (".", ".."):
        raise CheckpointError(f"{path}: reads its weights from {name!r:.80}; wanted one file beside it")
    beside = path.parent / name
    if not beside.is_file():
        raise CheckpointError(f"{beside}: no such file; it holds the weights of {path.name}, keep the two together")
    with beside.open("rb") as file:
        stamp = file.read(len(STAMP) + 64)
    if stamp != STAMP + str(export.get("weights_sha256")).encode():
        raise CheckpointError(f"{beside}: was not written with {path.name}; export it again")
    try:
        end = max(int(place["offset"]) + int(place["length"]) for place in places)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: does not say where its weights lie ({error}); export it again") from error
    if beside.stat().st_size != end:
        raise CheckpointError(
            f"{beside}: has {beside.stat().st_size} bytes, {path.name} reads {end}; was it cut short?"
        )
    return True
