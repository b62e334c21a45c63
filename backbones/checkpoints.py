"""The checkpoint: one .safetensors file, weights of a backbone plus a JSON manifest in its metadata.

Reading it never unpickles. Loading is strict: a missing, unknown or misshapen weight is an error that names it, and the stored content
hash must match the weights.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from backbones.resnet import ResNet, ResNetSpec
from backbones.vit import ViT, ViTSpec
from data.errors import InputError
from data.preprocess import Preprocess

MANIFEST_KEY = "dinoscope"
"""Metadata key of the manifest, in .safetensors and in .onnx files."""


class CheckpointError(InputError):
    """A weights file cannot be used: unreadable, of another architecture, or altered."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a backbone; travels with its weights through every format."""

    architecture: dict[str, Any]
    """`family` ("vit" or "resnet") and the fields of its spec."""
    preprocess: Preprocess = field(default_factory=Preprocess)
    weights_sha256: str = ""
    """Content hash of the weights, see `weights_sha256()`."""
    kind: str = "backbone"
    recipe: dict[str, Any] | None = None
    step: int | None = None
    source: str = ""
    """Where the weights come from: a run, a published name, a file."""
    revision: str = ""
    """Source revision of the code that wrote them."""
    data_fingerprint: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = {name.name: getattr(self, name.name) for name in dataclasses.fields(self)}
        return {**plain, "preprocess": self.preprocess.to_json()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Manifest":
        """The inverse of `to_json`; CheckpointError names what is missing or unknown."""
        check_manifest(plain, MANIFEST_TYPES, {"architecture", "preprocess"}, "a backbone")
        return cls(**{**plain, "preprocess": Preprocess.from_json(plain["preprocess"])})


MANIFEST_TYPES: dict[str, tuple[type, ...]] = {
    "architecture": (dict,),
    "preprocess": (dict,),
    "weights_sha256": (str,),
    "kind": (str,),
    "recipe": (dict, NoneType),
    "step": (int, NoneType),
    "source": (str,),
    "revision": (str,),
    "data_fingerprint": (str, NoneType),
    "metrics": (dict,),
}
"""What each field of a manifest is in JSON."""


def check_manifest(plain: object, types: Mapping[str, tuple[type, ...]], required: set[str], owner: str) -> None:
    """Raise CheckpointError unless `plain` is a mapping with the `required` fields and no other than `types` has, each of its type."""
    if not isinstance(plain, Mapping) or not required <= set(plain) <= set(types):
        found = f"has {sorted(plain)!s:.200}" if isinstance(plain, Mapping) else f"is a {type(plain).__name__}"
        raise CheckpointError(f"this is not {owner}'s manifest: it {found}, want {sorted(types)}")
    for name, value in plain.items():
        if not isinstance(value, types[name]):
            wanted = " or ".join(kind.__name__ for kind in types[name])
            raise CheckpointError(f"{name} in the manifest is a {type(value).__name__}, want {wanted}")


@dataclass(frozen=True)
class Backbone:
    """A network in evaluation mode, float32, and its manifest."""

    model: nn.Module
    manifest: Manifest


def make_backbone(architecture: Mapping[str, Any]) -> ViT | ResNet:
    """An initialised network from a manifest's `architecture`. Raises CheckpointError where it names no network of ours."""
    families = {"vit": (ViT, ViTSpec), "resnet": (ResNet, ResNetSpec)}
    if not isinstance(architecture, Mapping):
        raise CheckpointError(f"architecture is a {type(architecture).__name__}, want an object with `family`")
    fields = dict(architecture)
    family = fields.pop("family", None)
    if not isinstance(family, str) or family not in families:
        raise CheckpointError(f"architecture family {family!r} is unknown; want one of {', '.join(families)}")
    network, spec = families[family]
    known = {f.name for f in dataclasses.fields(spec)}
    if set(fields) - known:
        raise CheckpointError(
            f"architecture has unknown fields {sorted(set(fields) - known)}; {family} has {sorted(known)}"
        )
    try:
        return network(spec(**fields))
    except (
        TypeError,
        RuntimeError,
    ) as error:  # fields that are missing; sizes that together exceed what torch can count
        raise CheckpointError(f"architecture of family {family} is incomplete or mistyped: {error}") from error


def describe_architecture(model: ViT | ResNet) -> dict[str, Any]:
    """The `architecture` entry of a manifest, from which `make_backbone` makes the same network."""
    family = "vit" if isinstance(model, ViT) else "resnet"
    return {"family": family, **dataclasses.asdict(model.spec)}


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Content hash of named tensors: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path: Path, state: Mapping[str, Tensor], manifest_json: Mapping[str, Any]) -> None:
    """Write tensors and a manifest to a .safetensors file in one atomic, durable step."""
    path = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    data = safetensors.torch.save(state, metadata={MANIFEST_KEY: json.dumps(manifest_json, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and manifest of a .safetensors file; the manifest is None in a file that is not ours."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: what safetensors gives is a view of the mapped file, and would change, or crash, when the file is replaced in place.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; give the path of a .safetensors checkpoint") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable .safetensors file ({error}); was it cut short?") from error
    if MANIFEST_KEY not in metadata:
        return state, None
    try:
        return state, json.loads(metadata[MANIFEST_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its manifest is not JSON ({error}); write the file anew") from error


def load_state_strictly(model: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Load weights into a network; CheckpointError counts and names what is missing, unknown or misshapen."""
    wanted = model.state_dict()
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    misshapen = [
        f"{name} is {list(state[name].shape)}, want {list(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(state))
        if state[name].shape != wanted[name].shape
    ]
    mistyped = [
        f"{name} is {state[name].dtype}, want {wanted[name].dtype}"
        for name in sorted(set(wanted) & set(state))
        if state[name].is_floating_point() != wanted[name].is_floating_point()
    ]
    problems = [
        f"{len(names)} weights are {what}, first {names[0]}"
        for what, names in (
            ("missing", missing),
            ("unknown", extra),
            ("of another shape", misshapen),
            ("of another type", mistyped),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}. Was it saved by another architecture?")
    # A network without memory of its own takes the tensors themselves.
    model.load_state_dict(dict(state), assign=any(tensor.is_meta for tensor in wanted.values()))


def build_backbone(architecture: Mapping[str, Any], state: Mapping[str, Tensor], path: Path | str) -> ViT | ResNet:
    """A network in evaluation mode and float32 with these weights. Raises CheckpointError as `load_state_strictly` does.

    It is laid out on the meta device first, so that no memory is filled before the shapes are known to fit.
    """
    try:
        with torch.device("meta"):
            model = make_backbone(architecture)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    load_state_strictly(model, state, path)
    return model.float().eval()


def save_backbone(path: str | Path, model: ViT | ResNet, manifest: Manifest) -> Manifest:
    """Write a checkpoint atomically; architecture and content hash are taken from `model`. Returns the manifest as written."""
    state = model.state_dict()
    manifest = dataclasses.replace(
        manifest, architecture=describe_architecture(model), weights_sha256=weights_sha256(state)
    )
    save_tensors(Path(path), state, manifest.to_json())
    return manifest


def load_own_checkpoint(path: Path) -> Backbone:
    """Read a checkpoint written by `save_backbone`."""
    state, plain = load_tensors(path)
    if plain is None:
        raise CheckpointError(
            f"{path}: has no manifest, so it is not a checkpoint of ours; give its Hugging Face folder instead"
        )
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path}: its manifest is a {type(plain).__name__}, want an object; write the file anew")
    if plain.get("kind") != "backbone":
        raise CheckpointError(
            f"{path}: holds a {plain.get('kind')!s:.40} head, not a backbone; give the backbone's checkpoint"
        )
    try:
        manifest = Manifest.from_json(plain)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model = build_backbone(manifest.architecture, state, path)
    check_content(state, manifest.weights_sha256, path)
    return Backbone(model, manifest)


def check_content(state: Mapping[str, Tensor], sha256: str, path: Path | str) -> None:
    """Raise CheckpointError unless the weights have the content hash that their manifest states."""
    if sha256 != weights_sha256(state):
        raise CheckpointError(
            f"{path}: the weights do not match the content hash in their manifest; the file was altered"
        )


def load_backbone(ckpt: str | Path) -> Backbone:
    """The backbone that `--ckpt` names, in evaluation mode and float32. Raises CheckpointError.

    A .safetensors checkpoint of ours, a published .pth file, a Hugging Face folder, or a catalog name such as `dinov2_vits14`.
    """
    # The readers of other formats build on this file.
    from backbones.catalog import CATALOG, fetch, pin
    from backbones.huggingface import load_huggingface
    from backbones.published import load_published

    path = Path(ckpt)
    try:
        if path.is_dir() and (path / "config.json").is_file():
            return load_huggingface(path)
    except OSError as error:
        raise CheckpointError(f"{str(ckpt)[:80]}: cannot be opened ({error.strerror}); give a shorter path") from error
    if path.suffix in (".pth", ".pt"):
        return load_published(path)
    if str(ckpt) in CATALOG and not path.exists():
        backbone = load_published(fetch(str(ckpt)), source=str(ckpt))
        pin(str(ckpt), backbone.manifest.architecture)
        return backbone
    if path.suffix == ".safetensors":
        return load_own_checkpoint(path)
    came = "a folder without config.json is no backbone" if path.is_dir() else "is no backbone"
    raise CheckpointError(
        f"{ckpt}: {came}; want a .safetensors checkpoint, a .pth file, a Hugging Face folder (with config.json), "
        f"where networks are only run also an .onnx file, a .plan, or a server (grpc://host:port, http://host:port), "
        f"or one of {', '.join(CATALOG)}"
    )
