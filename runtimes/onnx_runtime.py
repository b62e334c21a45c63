"""An exported .onnx file on ONNX Runtime."""

import json
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from backbones.checkpoints import MANIFEST_KEY, CheckpointError, Manifest
from data.errors import InputError
from runtimes.runtime import Runtime

HEADS_KEY = "dinoscope_heads"
"""Metadata key of the heads' manifests: a JSON object from the head's kind to its manifest."""


class OnnxRuntime(Runtime):
    """One session, shared by all threads; only what leads to the outputs asked for is computed."""

    def __init__(self, path: str | Path, *, device: str = "auto", threads: int | None = None) -> None:
        check_one_build()
        self.name = "onnxruntime"
        options = ort.SessionOptions()
        # 3: errors only. The engine's warnings are about its own memory plan and help no user.
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = open_session(Path(path), options, pick_providers(device))
        self.device = "cuda" if self._session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        if device == "cuda" and self.device != "cuda":  # the engine falls back without a word
            raise InputError(
                "--device cuda: ONNX Runtime could not start CUDA here; check the driver, or use --device cpu"
            )
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.manifest, self.heads = read_metadata(metadata, path)
        self.outputs = tuple(output.name for output in self._session.get_outputs())
        self._only_fetches = ort.RunOptions()
        self._only_fetches.only_execute_path_to_fetches = True

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        self.check_call(pixels_NCHW, outputs)
        names = list(dict.fromkeys(outputs))
        try:
            made = self._session.run(names, {"pixels": np.ascontiguousarray(pixels_NCHW)}, self._only_fetches)
        except ort.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            raise InputError(f"this file does not take pixels of {list(pixels_NCHW.shape)}: {error}") from error
        return dict(zip(names, made, strict=True))

    def close(self) -> None:
        self.__dict__.pop("_session", None)


def read_metadata(metadata: dict[str, str], path: str | Path) -> tuple[Manifest, dict[str, dict[str, Any]]]:
    """The backbone's manifest and those of the heads. Raises CheckpointError for a file that was not exported here."""
    if MANIFEST_KEY not in metadata:
        raise CheckpointError(
            f"{path}: an .onnx without our manifest; its preprocessing is unknown. Export it with python -m exports.to_onnx"
        )
    try:
        return Manifest.from_json(json.loads(metadata[MANIFEST_KEY])), json.loads(metadata.get(HEADS_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: its manifest is not JSON ({error}); export it again") from error


def open_session(path: Path, options: ort.SessionOptions, providers: list[str]) -> ort.InferenceSession:
    """A session on a file. Raises CheckpointError where it is missing or no ONNX model."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of an .onnx file")
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the engine raises a dozen unrelated types
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path}: ONNX Runtime cannot load it ({reason}); was it cut short?") from error


def pick_providers(device: str) -> list[str]:
    """Execution providers for `--device`. Raises InputError for one that this build does not have."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device!r} is unknown; want auto, cpu or cuda")
    gpu = "CUDAExecutionProvider" in ort.get_available_providers()
    if device == "cuda" and not gpu:
        raise InputError("--device cuda: this onnxruntime has no CUDA; install with `make GPU=1`, or use --device cpu")
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if gpu and device != "cpu" else ["CPUExecutionProvider"]


def check_one_build() -> None:
    """Raise InputError where both onnxruntime and onnxruntime-gpu are installed: their files overwrite each other."""
    wanted = {"onnxruntime", "onnxruntime-gpu"}
    names = {str(d.metadata["Name"]).lower().replace("_", "-") for d in distributions() if d.metadata["Name"]}
    if wanted <= names:
        raise InputError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "uninstall both, then install the one that is wanted (make clean, then make test or make GPU=1 test)"
        )
