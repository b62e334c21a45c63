"""`--models` to networks that are ready to run: which files belong together, and what computes them.

Read in this order: Loaded, load_artifacts, `_choose` (folders), `_open`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError as ProtobufError
from safetensors import SafetensorError, safe_open

from backbones.checkpoints import MANIFEST_KEY, load_backbone
from backbones.heads import HEADS, load_depth_head
from data.errors import InputError
from runtimes.onnx_runtime import HEADS_KEY, OnnxRuntime, check_one_build
from runtimes.runtime import Runtime
from runtimes.torch_runtime import TorchRuntime
from server.config import ServerConfig

SUFFIXES = (".safetensors", ".onnx")


@dataclass(frozen=True)
class Loaded:
    """Copies of one network, all alike."""

    runtimes: tuple[Runtime, ...]
    version: str = "1"
    """The version that clients see: that of a Triton repository, else 1."""
    depth_unit: str | None = None
    """Unit of the depth head, where there is one."""


@dataclass(frozen=True)
class Artifact:
    """A file and what its manifest says, read without its weights."""

    path: Path
    kind: str
    """`backbone`, or a kind of head."""
    fits: str
    """Content hash of the backbone: its own, or the one that a head was trained on."""
    outputs: tuple[str, ...] = ()
    """What an .onnx computes."""
    depth_sha256: str | None = None
    """Content hash of the depth head: its own, or the one inside an .onnx."""

    @property
    def exported(self) -> bool:
        return self.path.suffix == ".onnx"


def load_artifacts(config: ServerConfig) -> Loaded:
    """Bring up what `--models` names, `--instances` times. Raises InputError for what is missing or does not fit."""
    check_one_build()
    path = config.models
    if not path.exists():
        raise InputError(
            f"--models {path}: there is no such file or folder; name a .safetensors, an .onnx or a folder of them"
        )
    if path.is_file():
        return _open(path, None, "1", config)
    files = [one for one in sorted(path.iterdir()) if one.suffix in SUFFIXES and not one.name.startswith(".")]
    if files:
        return _open(*_choose([read_artifact(one) for one in files], path), "1", config)
    exported, version = _newest(path)
    return _open(exported, None, version, config)


def read_artifact(path: Path) -> Artifact:
    """What a .safetensors or .onnx file is. Raises InputError for a file that is not ours."""
    metadata, outputs = _onnx_metadata(path) if path.suffix == ".onnx" else (_safetensors_metadata(path), ())
    manifest, heads = (_json_object(metadata.get(key, "{}"), path) for key in (MANIFEST_KEY, HEADS_KEY))
    kind = manifest.get("kind")
    if not isinstance(kind, str) or (kind != "backbone" and kind not in HEADS):
        found = f"is a {kind!s:.40}" if kind else "has no manifest of ours"
        raise InputError(
            f"{path}: {found}; wanted a backbone or a head ({', '.join(HEADS)}); move it out of the folder"
        )
    fits = manifest.get("weights_sha256" if kind == "backbone" else "backbone_sha256", "")
    depth = heads.get("depth", {}) if kind == "backbone" else manifest if kind == "depth" else {}
    depth_sha256 = depth.get("weights_sha256") if isinstance(depth, dict) else None
    return Artifact(path, kind, str(fits), outputs, depth_sha256)


def _json_object(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its manifest is not JSON ({error!s:.120}); write the file anew") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: its manifest is a JSON {type(value).__name__}, not an object; write the file anew")
    return value


def _safetensors_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(str(path), framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable .safetensors file ({error}); was it cut short?") from error


def _onnx_metadata(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    try:
        model: Any = onnx.load(str(path), load_external_data=False)
    except (ProtobufError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable .onnx file ({error}); was it cut short?") from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return metadata, tuple(output.name for output in model.graph.output)


def _choose(artifacts: Sequence[Artifact], folder: Path) -> tuple[Path, Path | None]:
    """The file of the backbone to run and the depth head to put on it. Raises InputError where that is not clear."""
    backbones = [one for one in artifacts if one.kind == "backbone"]
    heads = [one for one in artifacts if one.kind != "backbone"]
    if not backbones:
        raise InputError(f"--models {folder}: holds heads ({heads[0].path.name}) and no backbone; add theirs")
    one = backbones[0]
    other = next((other for other in backbones if other.fits != one.fits), None)
    if other:
        raise InputError(
            f"--models {folder}: {one.path.name} and {other.path.name} are different backbones, and one is served; "
            "name the file that is wanted"
        )
    for head in heads:
        if head.fits != one.fits:
            raise InputError(
                f"--models {folder}: the {head.kind} head {head.path.name} fits the backbone {head.fits[:12]}, and "
                f"{one.path.name} is {one.fits[:12]}; move it away, or train it anew on this backbone"
            )
    depth = [head for head in heads if head.kind == "depth"]
    if len(depth) > 1:
        raise InputError(
            f"--models {folder}: {depth[0].path.name} and {depth[1].path.name} are both depth heads; keep one"
        )
    return _pick_form(backbones, depth[0] if depth else None, folder)


def _pick_form(backbones: Sequence[Artifact], depth: Artifact | None, folder: Path) -> tuple[Path, Path | None]:
    """The .onnx where it has every output, depth by the same head included; the checkpoint otherwise."""
    exported = [one for one in backbones if one.exported]
    checkpoints = [one for one in backbones if not one.exported]
    whole = [one for one in exported if depth is None or one.depth_sha256 == depth.depth_sha256]
    # With no head beside it, an .onnx that has depth offers more than one that has not.
    whole.sort(key=lambda one: -len(one.outputs))
    if whole:
        return whole[0].path, None
    if depth is None:  # nothing here is exported
        return checkpoints[0].path, None
    if not checkpoints:
        raise InputError(
            f"--models {folder}: {exported[0].path.name} was exported without the depth head {depth.path.name}; "
            "export it again with --depth-head, or add the checkpoint it came from"
        )
    return checkpoints[0].path, depth.path


def _newest(folder: Path) -> tuple[Path, str]:
    """The model.onnx of the highest version in a Triton repository, and that version. Raises InputError."""
    versions = [path for path in sorted(folder.glob("*/*/model.onnx")) if path.parent.name.isdecimal()]
    names = sorted({path.parents[1].name for path in versions})
    if not names:
        raise InputError(
            f"--models {folder}: holds no backbone; wanted one .safetensors or .onnx in it, or NAME/VERSION/model.onnx"
        )
    if len(names) > 1:
        raise InputError(
            f"--models {folder}: {names[0]} and {names[1]} both have a model.onnx, and one is served; name the file"
        )
    path = max(versions, key=lambda path: int(path.parent.name))
    return path, str(int(path.parent.name))


def _open(path: Path, depth_head: Path | None, version: str, config: ServerConfig) -> Loaded:
    """`--instances` runtimes on one file, which share the machine's cores."""
    n = config.instances
    threads = config.threads or max(1, _cores() // n)
    if path.suffix == ".onnx":
        sessions = [OnnxRuntime(path, device=config.device, threads=threads) for _ in range(n)]
        try:
            unit = sessions[0].heads.get("depth", {}).get("spec", {}).get("unit")
        except AttributeError as error:
            raise InputError(f"{path}: the manifest of its heads is damaged; export it again") from error
        return Loaded(tuple(sessions), version, unit)
    backbone = load_backbone(path)
    head = None if depth_head is None else load_depth_head(depth_head, backbone.manifest.weights_sha256)[0]
    # The copies share their weights, which nobody changes; each has its own lock and so its own turn.
    runtimes = [TorchRuntime(backbone, head, device=config.device, threads=threads) for _ in range(n)]
    return Loaded(tuple(runtimes), version, head.spec.unit if head else None)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
