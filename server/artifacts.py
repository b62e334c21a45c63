"""`--models` to networks that are ready to run: which files belong together, and what computes them.

Read in this order: Loaded, load_artifacts, `_choose` (folders), `_open`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError as ProtobufError
from safetensors import SafetensorError, safe_open

from backbones.checkpoints import MANIFEST_KEY, load_backbone
from backbones.heads import HEADS
from backbones.network import load_heads, make_network
from data.errors import InputError
from runtimes.onnx_build import check_one_build
from runtimes.onnx_runtime import EXPORT_KEY, HEADS_KEY, OnnxRuntime
from runtimes.runtime import Runtime
from runtimes.tensorrt_runtime import TensorRTRuntime
from runtimes.torch_runtime import TorchRuntime, pick_device
from server.config import ServerConfig
from server.cores import Share, share_cores, usable_cores

SUFFIXES = (".safetensors", ".onnx")


@dataclass(frozen=True)
class Loaded:
    """Copies of one network, all alike: as many as may run at the same time; they may be one object that can be run so."""

    runtimes: tuple[Runtime, ...]
    version: str = "1"
    """The version that clients see: that of a Triton repository, else 1."""
    depth_unit: str | None = None
    """Unit of the depth head, where there is one."""
    classes: tuple[str, ...] = ()
    """Names of the classes that the segmentation head tells apart, where there is one."""
    labels: tuple[str, ...] = ()
    """Names of the classes that the linear head tells apart, where there is one."""


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
    heads: Mapping[str, str | None] = field(default_factory=dict)
    """Kind to content hash of the heads: its own, or those inside an .onnx."""
    precision: str = "fp32"
    """Of an .onnx."""

    @property
    def exported(self) -> bool:
        return self.path.suffix == ".onnx"


def load_artifacts(config: ServerConfig) -> Loaded:
    """Bring up what `--models` names, `--instances` times on each device. Raises InputError for what is missing or does not fit."""
    try:
        return _load_all(config)
    except OSError as error:  # most often a file that the server's user may not read
        where = config.models if error.filename is None else error.filename
        raise InputError(
            f"--models {config.models}: {where} cannot be read ({error.strerror or error}); let the server's user read it"
        ) from error


def _load_all(config: ServerConfig) -> Loaded:
    check_one_build()
    devices = config.device.split(",")
    if len(devices) == 1:
        return _load(config)
    if config.models.suffix == ".plan":
        raise InputError(f"--device {config.device}: a TensorRT plan runs on one device; start a server for each")
    threads = config.threads or max(1, usable_cores() // len(devices))
    loaded = [
        _load(replace(config, device=device.strip(), instances=config.instances or 1, threads=threads))
        for device in devices
    ]
    return replace(loaded[0], runtimes=tuple(runtime for one in loaded for runtime in one.runtimes))


def _load(config: ServerConfig) -> Loaded:
    """The copies on one device."""
    path = config.models
    if not path.exists():
        raise InputError(
            f"--models {path}: there is no such file or folder; name a .safetensors, an .onnx or a folder of them"
        )
    if path.suffix == ".plan":
        plan = TensorRTRuntime(path, device=config.device)  # one engine fills its GPU
        return Loaded((plan,), "1", *_told_by_heads(plan.heads, path))
    if path.is_file():
        return _open(path, {}, "1", config)
    files = [one for one in sorted(path.iterdir()) if one.suffix in SUFFIXES and not one.name.startswith(".")]
    if files:
        return _open(*_choose([read_artifact(one) for one in files], path), "1", config)
    exported, version = _version_of(path, config.version)
    return _open(exported, {}, version, config)


def read_artifact(path: Path) -> Artifact:
    """What a .safetensors or .onnx file is. Raises InputError for a file that is not ours."""
    metadata, outputs = _onnx_metadata(path) if path.suffix == ".onnx" else (_safetensors_metadata(path), ())
    manifest, heads, form = (
        _json_object(metadata.get(key, "{}"), path) for key in (MANIFEST_KEY, HEADS_KEY, EXPORT_KEY)
    )
    kind = manifest.get("kind")
    if not isinstance(kind, str) or (kind != "backbone" and kind not in HEADS):
        found = f"is a {kind!s:.40}" if kind else "has no manifest of ours"
        raise InputError(
            f"{path}: {found}; wanted a backbone or a head ({', '.join(HEADS)}); move it out of the folder"
        )
    fits = manifest.get("weights_sha256" if kind == "backbone" else "backbone_sha256", "")
    own = heads if kind == "backbone" else {kind: manifest}
    hashes = {name: one.get("weights_sha256") for name, one in own.items() if isinstance(one, dict)}
    return Artifact(path, kind, str(fits), outputs, hashes, str(form.get("precision", "fp32")))


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


def _choose(artifacts: Sequence[Artifact], folder: Path) -> tuple[Path, dict[str, Path]]:
    """The file of the backbone to run and the heads to put on it, by kind. Raises InputError where that is not clear."""
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
    chosen: dict[str, Artifact] = {}
    for head in heads:
        if head.kind in chosen:
            raise InputError(
                f"--models {folder}: {chosen[head.kind].path.name} and {head.path.name} are both {head.kind} heads; keep one"
            )
        chosen[head.kind] = head
    return _pick_form(backbones, chosen, folder)


def _pick_form(
    backbones: Sequence[Artifact], heads: Mapping[str, Artifact], folder: Path
) -> tuple[Path, dict[str, Path]]:
    """The .onnx where it has every output, by the same heads; the checkpoint otherwise.

    A file of lower precision is taken only where there is no other: nobody asked for its drift.
    """
    exported = [one for one in backbones if one.exported]
    checkpoints = [one for one in backbones if not one.exported]
    wanted = {kind: head.heads[kind] for kind, head in heads.items()}
    whole = [one for one in exported if all(one.heads.get(kind) == sha256 for kind, sha256 in wanted.items())]
    if checkpoints:
        whole = [one for one in whole if one.precision == "fp32"]
    # With no head beside it, an .onnx that has depth offers more than one that has not.
    whole.sort(key=lambda one: (one.precision != "fp32", -len(one.outputs)))
    if whole:
        return whole[0].path, {}
    if not checkpoints:
        kind, head = next((kind, head) for kind, head in heads.items() if exported[0].heads.get(kind) != wanted[kind])
        raise InputError(
            f"--models {folder}: {exported[0].path.name} was exported without the {kind} head {head.path.name}; "
            f"export it again with --{kind}-head, or add the checkpoint it came from"
        )
    return checkpoints[0].path, {kind: head.path for kind, head in heads.items()}


def versions_in(folder: Path) -> list[str]:
    """Versions of a Triton repository, lowest first; none for anything else."""
    files = folder.glob("*/*/model.onnx") if folder.is_dir() else ()
    return [str(n) for n in sorted({int(path.parent.name) for path in files if path.parent.name.isdecimal()})]


def _version_of(folder: Path, wanted: str | None) -> tuple[Path, str]:
    """The model.onnx of a version, or of the highest, in a Triton repository, and that version. Raises InputError."""
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
    if wanted is not None:
        named = [path for path in versions if wanted.isdecimal() and int(path.parent.name) == int(wanted)]
        if not named:
            raise InputError(f"--version {wanted}: {folder} has the versions {', '.join(versions_in(folder))}")
        path = named[0]
    return path, str(int(path.parent.name))


def _open(path: Path, heads: Mapping[str, Path], version: str, config: ServerConfig) -> Loaded:
    """The copies of one file that run at the same time; they share the machine's cores."""
    share = share_cores(config.instances, config.threads, usable_cores())
    if path.suffix == ".onnx":
        return _open_exported(path, version, config, share)
    backbone = load_backbone(path)
    given = load_heads(backbone, **heads)
    network = make_network(backbone, given)
    n = _copies(pick_device(config.device), config, share)
    # The copies share their weights, which nobody changes; each has its own lock and so its own turn.
    runtimes = [TorchRuntime(backbone, network=network, device=config.device, threads=share.threads) for _ in range(n)]
    unit = given.depth[0].spec.unit if given.depth else None
    classes, labels = (head[1].classes if head else () for head in (given.segmentation, given.linear))
    return Loaded(tuple(runtimes), version, unit, classes, labels)


def _told_by_heads(heads: Mapping[str, Any], path: Path) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """The unit of depth, and the names of pixels' and of images' classes, that an exported file states. Raises InputError."""
    try:
        unit = heads.get("depth", {}).get("spec", {}).get("unit")
        classes, labels = (
            tuple(map(str, heads.get(kind, {}).get("classes", ()))) for kind in ("segmentation", "linear")
        )
        return unit, classes, labels
    except (AttributeError, TypeError) as error:
        raise InputError(f"{path}: the manifest of its heads is damaged; export it again") from error


def _open_exported(path: Path, version: str, config: ServerConfig, share: Share) -> Loaded:
    def open_one() -> OnnxRuntime:
        return OnnxRuntime(path, device=config.device, threads=share.threads, spinning=config.spinning)

    first = open_one()
    n = _copies(first.device, config, share)
    # A session of one thread computes in the thread that calls it: copies can share one, and so its weights, and lose no time by it.
    alike = first.device == "cpu" and share.threads == 1
    runtimes = (first,) * n if alike else (first, *(open_one() for _ in range(n - 1)))
    return Loaded(runtimes, version, *_told_by_heads(first.heads, path))


def _copies(device: str, config: ServerConfig, share: Share) -> int:
    """One copy fills a GPU."""
    return 1 if device.startswith("cuda") and config.instances is None else share.instances
