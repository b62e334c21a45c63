"""Writes NAME.onnx.data while a graph is put together, weight by weight, so that none of them is held twice. See `runtimes.weight_file`."""

import hashlib
import os
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from runtimes.weight_file import PAGE_BYTES, STAMP

LEAST_BYTES = 2**16
"""Smaller weights stay in the .onnx, norms and biases among them, which heads read too."""


class WeightWriter:
    """The second file under construction."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._file = path.open("wb")
        self._file.write(bytes(PAGE_BYTES))

    def add(self, name: str, array: np.ndarray) -> TensorProto:
        """Write a weight; returns what stands for it in the graph."""
        self._write(bytes(-self._file.tell() % PAGE_BYTES))
        offset = self._file.tell()
        self._write(np.ascontiguousarray(array).data.cast("B"))
        tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def _write(self, content: bytes | memoryview) -> None:
        self._hash.update(content)
        self._file.write(content)

    def finish(self) -> str:
        """Put the stamp in its place and everything on the disk; returns the hash that the .onnx has to state."""
        found = self._hash.hexdigest()
        self._file.seek(0)
        self._file.write(STAMP + found.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.chmod(self.path, 0o644)
        return found
