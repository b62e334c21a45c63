"""An exported .onnx file on ONNX Runtime."""

import json
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from backbones.checkpoints import MANIFEST_KEY, CheckpointError, Manifest
from data.errors import InputError
from runtimes.onnx_graph import split_off_depth
from runtimes.runtime import Runtime

HEADS_KEY = "dinoscope_heads"
"""Metadata key of the heads' manifests: a JSON object from the head's kind to its manifest."""
_DEPTH_INPUTS = ("embedding", "patches")


class OnnxRuntime(Runtime):
    """One session for the backbone, and one for the depth head where the file has it; shared by all threads."""

    def __init__(self, path: str | Path, *, device: str = "auto", threads: int | None = None) -> None:
        check_one_build()
        self.name = "onnxruntime"
        options = ort.SessionOptions()
        # 4: fatal only. The engine's warnings are about its own memory plan, and its errors are raised as well.
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = pick_providers(device)
        session = open_session(Path(path), options, providers)
        self.device = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        if device == "cuda" and self.device != "cuda":  # the engine falls back without a word
            raise InputError(
                "--device cuda: ONNX Runtime could not start CUDA here; check the driver, or use --device cpu"
            )
        self.manifest, self.heads = read_metadata(session.get_modelmeta().custom_metadata_map, path)
        self.outputs = tuple(output.name for output in session.get_outputs())
        self._backbone: ort.InferenceSession | None = session
        self._depth: ort.InferenceSession | None = None
        if "depth" in self.outputs:
            del session, self._backbone  # before the same weights are loaded once more
            self._backbone, self._depth = (
                ort.InferenceSession(part.SerializeToString(), options, providers=providers)
                for part in split_off_depth(onnx.load(path))
            )

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        self.check_call(pixels_NCHW, outputs)
        if self._backbone is None:
            raise InputError("this runtime was closed; open it again")
        given = {"pixels": np.ascontiguousarray(pixels_NCHW)}
        # the depth head continues from these two
        names = dict.fromkeys((*(name for name in outputs if name != "depth"), *_DEPTH_INPUTS * ("depth" in outputs)))
        try:
            made = dict(zip(names, self._backbone.run(list(names), given), strict=True))
        except ort.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            raise InputError(f"this file does not take pixels of {list(pixels_NCHW.shape)}: {error}") from error
        if "depth" in outputs and self._depth is not None:
            (made["depth"],) = self._depth.run(["depth"], given | {name: made[name] for name in _DEPTH_INPUTS})
        return {name: made[name] for name in outputs}

    def close(self) -> None:
        self._backbone = self._depth = None


def read_metadata(metadata: dict[str, str], path: str | Path) -> tuple[Manifest, dict[str, dict[str, Any]]]:
    """The backbone's manifest and those of the heads. Raises CheckpointError for a file that was not exported here."""
    if MANIFEST_KEY not in metadata:
        raise CheckpointError(
            f"{path}: an .onnx without our manifest; its preprocessing is unknown. Export it with python -m exports.to_onnx"
        )
    try:
        plain, heads = json.loads(metadata[MANIFEST_KEY]), json.loads(metadata.get(HEADS_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its manifest is not JSON ({error!s:.120}); export it again") from error
    if not isinstance(plain, dict) or not isinstance(heads, dict):
        raise CheckpointError(f"{path}: its manifest is no object; export it again")
    try:
        return Manifest.from_json(plain), heads
    except InputError as error:
        raise CheckpointError(f"{path}: {error}; export it again") from error


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
