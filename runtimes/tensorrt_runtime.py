"""A TensorRT plan on the GPU it was built for. Torch holds the memory; nothing is copied between them."""

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones.checkpoints import CheckpointError, Manifest
from data.errors import InputError
from runtimes.runtime import Runtime, run_in_parts

SIDECAR = ".json"
"""Ending of the file beside a plan (NAME.plan.json) that holds its manifest: a plan itself has no room for one."""
_NUMPY_OF = {"FLOAT": torch.float32, "INT32": torch.int32, "INT64": torch.int64, "UINT8": torch.uint8}


class TensorRTRuntime(Runtime):
    """One engine and one execution context; calls take turns. A batch larger than the plan's is run in parts."""

    def __init__(self, path: str | Path, *, device: str = "auto", max_batch: int | None = None) -> None:
        self.name = "tensorrt"
        path = Path(path)
        told = read_sidecar(path)
        self.manifest = Manifest.from_json(told["manifest"])
        self.heads: dict[str, Any] = told.get("heads", {})
        self.export: dict[str, Any] = told.get("export", {})
        self.precision = str(self.export.get("precision", "fp32"))
        if device == "cpu":
            raise InputError("--device cpu: a TensorRT plan runs on a GPU; name the .onnx or the checkpoint instead")
        trt = import_tensorrt(told, path)
        self.device = self._gpu()
        logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise CheckpointError(
                f"{path}: TensorRT {trt.__version__} cannot read this plan here; it was built by {told['tensorrt']} for "
                f"{told.get('gpu', 'another GPU')}, build it on this machine with python -m exports.to_tensorrt"
            )
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(k) for k in range(self._engine.num_io_tensors)]
        self.outputs = tuple(name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT)
        self._types = {name: _NUMPY_OF[self._engine.get_tensor_dtype(name).name] for name in self.outputs}
        least, _, most = (tuple(shape) for shape in told["profile"])
        self._least, self._most = least, most
        if least[2:] == most[2:]:
            self.fixed_px = (least[2], least[3])
        self.max_batch: int = min(max_batch or most[0], most[0])
        self._lock = threading.Lock()

    @staticmethod
    def _gpu() -> str:
        if not torch.cuda.is_available():
            raise InputError("a TensorRT plan runs on a GPU, and torch sees none here; name the .onnx instead")
        return "cuda"

    def check_sides(self, height_px: int, width_px: int) -> None:
        super().check_sides(height_px, width_px)
        least, most = self._least[2:], self._most[2:]
        if not (least[0] <= height_px <= most[0] and least[1] <= width_px <= most[1]):
            raise InputError(
                f"images are {height_px}x{width_px} pixels; this plan was built for {least[0]}x{least[1]} to {most[0]}x{most[1]}"
            )

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        self.check_call(pixels_NCHW, outputs)
        with self._lock:
            return run_in_parts(lambda part: self._run(part, outputs), pixels_NCHW, self.max_batch)

    def _run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        pixels = torch.from_numpy(np.require(pixels_NCHW, requirements=["C", "W"])).to(self.device)
        if not self._context.set_input_shape("pixels", tuple(pixels.shape)):
            raise InputError(f"this plan does not take pixels of {list(pixels.shape)}")
        held = {"pixels": pixels}
        for name in self.outputs:  # TensorRT writes them all, wanted or not
            shape = tuple(self._context.get_tensor_shape(name))
            held[name] = torch.empty(shape, dtype=self._types[name], device=self.device)
        for name, tensor in held.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._execute():
            raise RuntimeError("TensorRT could not run the plan; see its log above")
        return {name: held[name].cpu().numpy() for name in outputs}

    def _execute(self) -> bool:
        stream = torch.cuda.current_stream()
        done = bool(self._context.execute_async_v3(stream.cuda_stream))
        stream.synchronize()
        return done

    def close(self) -> None:
        self._context = self._engine = self._runtime = None


def sidecar_of(path: Path) -> Path:
    """The file that tells what a plan is."""
    return path.with_name(path.name + SIDECAR)


def read_sidecar(path: Path) -> dict[str, Any]:
    """What is told of a plan. Raises CheckpointError where it, or the plan, is missing, damaged or not of this plan."""
    beside = sidecar_of(path)
    for file in (path, beside):
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; a plan is two files, NAME.plan and NAME.plan{SIDECAR}")
    try:
        told = json.loads(beside.read_text())
        complete = {"manifest", "tensorrt", "profile", "plan_sha256"} <= set(told) and len(told["profile"]) == 3
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{beside}: is not readable ({error!s:.120}); build the plan again") from error
    if not isinstance(told, dict) or not complete:
        raise CheckpointError(f"{beside}: does not tell what the plan is; build the plan again")
    with path.open("rb") as plan:
        found = hashlib.file_digest(plan, "sha256").hexdigest()
    if found != told["plan_sha256"]:
        raise CheckpointError(f"{beside}: was written for another plan than {path.name}; build the plan again")
    return told


def import_tensorrt(told: dict[str, Any], path: Path) -> Any:
    """The module `tensorrt` of the version that built the plan. Raises InputError where it is missing or another."""
    try:
        import tensorrt
    except Exception as error:  # an import of half an installation raises what it likes
        raise InputError(f"{path}: TensorRT is not installed here; install `tensorrt=={told['tensorrt']}`") from error
    if str(tensorrt.__version__) != str(told["tensorrt"]):
        raise InputError(
            f"{path}: was built by TensorRT {told['tensorrt']}, and {tensorrt.__version__} is installed; "
            "plans are tied to their version: build it again with python -m exports.to_tensorrt"
        )
    return tensorrt
