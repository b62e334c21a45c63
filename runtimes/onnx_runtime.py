"""An exported .onnx file on ONNX Runtime."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError as ProtobufError

from backbones.checkpoints import MANIFEST_KEY, CheckpointError, Manifest
from data.errors import InputError
from data.preprocess import Preprocess
from runtimes.onnx_build import check_one_build
from runtimes.onnx_graph import fuse_attention, outputs_of, split_heads
from runtimes.runtime import Runtime, gpu_number, run_in_parts
from runtimes.weight_file import FOLDER_ENTRY, check_weight_file

HEADS_KEY = "dinoscope_heads"
"""Metadata key of the heads' manifests: a JSON object from the head's kind to its manifest."""
EXPORT_KEY = "dinoscope_export"
"""Metadata key of the file's own form: a JSON object with `precision`, `fixed_px`, `input` and, where it was measured, `drift`."""
CPU_ROWS = 4
"""Images that a CPU is given at a time; with more, the features of a layer leave its caches (measured: 15 % more time at 16).

In dynamic int8 it is one: a batch is rounded as one tensor, so an image would have other features beside others, and worse ones.
"""


class OnnxRuntime(Runtime):
    """One session for the backbone and one for each head; shared by all threads.

    `threads` bounds the threads of one call (they sleep while they wait, so that others can use the cores, unless `spinning`), `max_batch`
    the images computed at a time; larger batches are run in parts.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        max_batch: int | None = None,
        spinning: bool = False,
    ) -> None:
        check_one_build()
        self.name = "onnxruntime"
        path = Path(path)
        model = load_model(path)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.manifest, self.heads = read_metadata(metadata, path)
        self.export = read_export(metadata, path)
        self.precision = str(self.export.get("precision", "fp32"))
        self.outputs = outputs_of(model)
        self.threads = threads
        options, providers = session_options(threads, spinning), pick_providers(device)
        if check_weight_file(model, self.export, path):
            options.add_session_config_entry(FOLDER_ENTRY, str(path.resolve().parent))
        fused = fuse_attention(model) if providers[0] == "CPUExecutionProvider" else 0
        self.holds_scores = not fused
        backbone, parts = split_heads(model)
        del model
        self._read = tuple(output.name for output in backbone.graph.output)
        self._backbone: ort.InferenceSession | None = open_session(backbone, options, providers, path)
        del backbone
        self._heads = {part.output: (open_session(part.model, options, providers, path), part.inputs) for part in parts}
        started = self._backbone.get_providers()[0] == "CUDAExecutionProvider"
        self.device = (device if device.startswith("cuda") else "cuda") if started else "cpu"
        if device.startswith("cuda") and not started:  # the engine falls back without a word
            raise InputError(
                f"--device {device}: ONNX Runtime could not start CUDA here; check the driver, or use --device cpu"
            )
        rows = 1 if self.precision == "int8" else CPU_ROWS
        self.max_batch = max_batch or (rows if self.device == "cpu" else None)
        self.shades_only = self.export.get("input") == "uint8"
        if fixed := self.export.get("fixed_px"):
            self.fixed_px = (fixed[0], fixed[1])

    def check_sides(self, height_px: int, width_px: int) -> None:
        super().check_sides(height_px, width_px)
        if self.fixed_px and self.fixed_px != (height_px, width_px):
            height, width = self.fixed_px
            raise InputError(f"this file takes images of {height}x{width} only, {height_px}x{width_px} came")

    def check_values(self, pixels_NCHW: np.ndarray) -> None:
        if self.shades_only:
            as_shades(pixels_NCHW, self.manifest.preprocess)

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        self.check_call(pixels_NCHW, outputs)
        if self.shades_only:
            pixels_NCHW = as_shades(pixels_NCHW, self.manifest.preprocess)
        return run_in_parts(lambda part: self._run(part, outputs), pixels_NCHW, self.max_batch or len(pixels_NCHW))

    def _run(self, pixels: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        if self._backbone is None:
            raise InputError("this runtime was closed; open it again")
        heads = {name: self._heads[name] for name in outputs if name in self._heads}
        read = [name for _, inputs in heads.values() for name in inputs if name != "pixels"]
        names = list(dict.fromkeys([*(name for name in outputs if name not in heads), *read]))
        made: dict[str, np.ndarray] = {"pixels": np.ascontiguousarray(pixels)}
        try:
            made |= zip(names, self._backbone.run(names, made), strict=True)
        except ort.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            shape = list(pixels.shape)
            raise InputError(f"this file does not take pixels of {shape}: {' '.join(str(error).split())}") from error
        for name, (session, inputs) in heads.items():
            (made[name],) = session.run([name], {given: made[given] for given in inputs})
        return {name: made[name] for name in outputs}

    def close(self) -> None:
        self._backbone = None
        self._heads = {}


def session_options(threads: int | None, spinning: bool = False) -> ort.SessionOptions:
    """Sessions that share a machine: a bounded number of threads, which do not spin while they wait unless that is asked for."""
    options = ort.SessionOptions()
    # 4: fatal only. The engine's warnings are about its own memory plan, and its errors are raised as well.
    options.log_severity_level = 4
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def as_shades(pixels_NCHW: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """The uint8 [N, H, W, 3] that normalised pixels came from. Raises InputError for pixels that no image has."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocess.mean, preprocess.std))
    shades = (pixels_NCHW * std + mean) * np.float32(255)
    whole = np.rint(shades)
    if not (np.abs(shades - whole) < 0.02).all() or whole.min() < 0 or whole.max() > 255:
        raise InputError(
            "this file takes images of 8 bits (exported with --uint8); pixels came that are none, normalised"
        )
    return np.ascontiguousarray(whole.astype(np.uint8).transpose(0, 2, 3, 1))


def read_export(metadata: dict[str, str], path: str | Path) -> dict[str, Any]:
    """What a file says of its own form; empty in files that say nothing. Raises CheckpointError."""
    try:
        plain = json.loads(metadata.get(EXPORT_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its description is not JSON ({error!s:.120}); export it again") from error
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path}: its description is no object; export it again")
    return plain


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


def load_model(path: Path) -> onnx.ModelProto:
    """The model in a file; weights that lie in another one stay there. Raises CheckpointError where it is missing or no ONNX model."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of an .onnx file")
    try:
        model = onnx.load(path, load_external_data=False)
    except (ProtobufError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable .onnx file ({error}); was it cut short?") from error
    if not model.graph.output:
        raise CheckpointError(f"{path}: not a readable .onnx file (no outputs); was it cut short?")
    return model


def open_session(
    model: onnx.ModelProto, options: ort.SessionOptions, providers: list[Any], path: str | Path
) -> ort.InferenceSession:
    """A session on a model. Raises CheckpointError where the engine refuses it."""
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=providers)
    except Exception as error:  # the engine raises a dozen unrelated types
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path}: ONNX Runtime cannot load it ({reason}); was it cut short?") from error


def pick_providers(device: str) -> list[Any]:
    """Execution providers for `--device`. Raises InputError for one that this build does not have."""
    number = gpu_number(device)
    gpu = "CUDAExecutionProvider" in ort.get_available_providers()
    if device.startswith("cuda") and not gpu:
        raise InputError(
            f"--device {device}: this onnxruntime has no CUDA; install with `make GPU=1`, or use --device cpu"
        )
    if number is not None:
        return [("CUDAExecutionProvider", {"device_id": number}), "CPUExecutionProvider"]
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if gpu and device != "cpu" else ["CPUExecutionProvider"]
