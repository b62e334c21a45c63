"""Published weights in .pth files: backbones of DINOv1 and DINOv2, alone or inside a training checkpoint.

A .pth file is a pickle. It is read by torch's restricted unpickler, which builds tensors and plain values and refuses everything else;
a training checkpoint also holds the settings of its run as an argparse.Namespace and learning rates as NumPy scalars, so these are
allowed too. Loading is as strict as for our own files: no weight may be missing, unknown or misshapen, once heads are left aside.
"""

import argparse
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.checkpoints import (
    Backbone,
    CheckpointError,
    Manifest,
    build_backbone,
    describe_architecture,
    weights_sha256,
)
from backbones.infer import infer_architecture, is_resnet
from backbones.vit import VIT_SIZES
from data.preprocess import Preprocess

NETWORKS = ("teacher", "student", "model")
"""Entries of a training checkpoint that hold weights, the one to evaluate first."""
HEADS = ("head.", "dino_head.", "ibot_head.")
"""Weights that only training uses."""
_DTYPES = [type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")]
_ALLOWED: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *_DTYPES,
    # A NumPy scalar in files written by NumPy 1 and by NumPy 2.
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # type: ignore[attr-defined]
]


def load_published(path: str | Path, architecture: Mapping[str, Any] | None = None, source: str = "") -> Backbone:
    """Read a .pth file of DINOv1 or DINOv2; a training checkpoint gives its teacher.

    `architecture` states fields of the manifest's architecture that the weights cannot tell, such as `heads`; a file
    NAME.architecture.json beside NAME.pth does the same. `source` is what the manifest names as origin, by default the file's name.
    Raises CheckpointError.
    """
    path = Path(path)
    content = read_pickle(path)
    state = clean_state(find_state(content, path), path)
    given = {**_heads_from_settings(content), **_stated_beside(path), **(architecture or {})}
    if is_resnet(state):
        given.pop("heads", None)
    return backbone_from_state(state, infer_architecture(state, given, path), path, source=source or path.name)


def backbone_from_state(
    state: Mapping[str, Tensor],
    architecture: Mapping[str, Any],
    path: Path,
    *,
    source: str,
    preprocess: Preprocess | None = None,
) -> Backbone:
    """A backbone and its manifest from weights under our names; without `preprocess` the published one is assumed."""
    model = build_backbone(architecture, state, path)
    manifest = Manifest(
        architecture=describe_architecture(model),
        preprocess=preprocess or usual_preprocess(model.patch_px),
        weights_sha256=weights_sha256(model.state_dict()),
        source=source,
    )
    return Backbone(model, manifest)


def usual_preprocess(patch_px: int) -> Preprocess:
    """How the published networks were evaluated: short side to 256, centre 224, bicubic, ImageNet statistics.

    Where 224 is not whole patches the views shrink to the next size that is.
    """
    side = max(Preprocess().size_px // patch_px, 1) * patch_px
    return Preprocess(size_px=side, resize_px=round(side * 256 / 224), whole_px=side)


def read_pickle(path: Path) -> Any:
    """What torch.load finds in a file, nothing but tensors and plain values. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a .pth file")
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes in the unpickler
        reason = _in_our_words(str(error)) or type(error).__name__
        raise CheckpointError(
            f"{path}: not a file of plain weights ({reason}); was it cut short, or is it another kind of pickle?"
        ) from error


def _in_our_words(text: str) -> str:
    """The unpickler's reason without its advice, which is meant for whoever calls torch.load."""
    plain = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    found = re.search(r"WeightsUnpickler error: (.+?)(?: Please| Check|$)", plain)
    return (
        found[1] if found else re.split(r" ?(?:In PyTorch 2\.6|Re-running|Please file|This is an internal)", plain)[0]
    ).rstrip(" .")[:160]


def find_state(content: Any, path: Path) -> Mapping[str, Any]:
    """The names and weights inside a file's content: its teacher, else its student, else `model`, else itself."""
    if isinstance(content, Mapping):
        content = next((content[name] for name in NETWORKS if isinstance(content.get(name), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, want named weights; is it a checkpoint?")
    for network in ("teacher.", "student."):  # both networks side by side, as DINOv2's own trainer keeps them
        if found := {n.removeprefix(network): weight for n, weight in content.items() if n.startswith(network)}:
            return found
    return content


def clean_state(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Weights under our names: without prefixes of wrappers, without heads, blocks unchunked."""
    clean: dict[str, Tensor] = {}
    for name, weight in state.items():
        name = name.removeprefix("module.").removeprefix("backbone.")
        if name.startswith(HEADS):
            continue
        # Chunked blocks carry the chunk and then the number in the whole network: blocks.CHUNK.NUMBER.
        name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)
        if not isinstance(weight, Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(weight).__name__}, want a tensor; is it a checkpoint?")
        if weight.layout is not torch.strided:
            raise CheckpointError(
                f"{path}: {name} is stored as {weight.layout}, want a dense tensor; save it with to_dense()"
            )
        if name in clean:
            raise CheckpointError(f"{path}: {name} is there twice; want one network in the file")
        clean[name] = weight
    if not is_resnet(clean):
        return clean
    # Files older than the counter of batches have none; evaluation does not use it.
    counters = {f"{name.removesuffix('running_var')}num_batches_tracked" for name in clean if "running_var" in name}
    clean = {**{name: torch.tensor(0) for name in counters}, **clean}
    return {name: weight for name, weight in clean.items() if not name.startswith("fc.")}


def _stated_beside(path: Path) -> dict[str, Any]:
    stated = path.with_suffix(".architecture.json")
    return read_json(stated) if stated.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError."""
    try:
        plain = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not readable as JSON ({error}); download or write it anew") from error
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path}: holds a {type(plain).__name__}, want an object with named fields")
    return plain


def _heads_from_settings(content: Any) -> dict[str, int]:
    """The number of heads where the run's settings name a size of ViT, as DINOv1's training checkpoints do."""
    settings = content.get("args") if isinstance(content, Mapping) else None
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    arch = settings.get("arch") if isinstance(settings, Mapping) else None
    size = str(arch).removeprefix("vit_").removeprefix("deit_")
    return {"heads": VIT_SIZES[size][2]} if size in VIT_SIZES else {}
