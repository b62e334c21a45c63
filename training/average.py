"""Averages of weights: `python -m training.average --ckpt A.safetensors B.safetensors --weights 0.4 0.6 --out C.safetensors`.

Networks that were trained on from the same weights often lie in one basin of the loss, and a point between them can be better than each
(Wortsman et al. 2022: "Robust fine-tuning of zero-shot models", equation 1; and "Model soups"). Nothing is trained, and the
result costs no more to serve than one of them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from backbones.checkpoints import Backbone, Manifest, load_backbone, make_backbone, save_backbone
from data.errors import InputError, run_cli
from data.preprocess import Preprocess
from training.warm_start import TABLE, resize_table

MASK_TOKEN = "mask_token"
"""Only DINOv2 learns one; a network without it can still be averaged with one that has it."""
OF_A_PHASE = (MASK_TOKEN, "drop_path", "drop_path_uniform", "img_px")
"""Parts of an architecture that phases of one network may differ in: a finished one has the same weights with or without, and a table of
positions for crops of another size is resized as the phase resized it when it began."""
SIZES = ("size_px", "resize_px", "whole_px")
"""And of preprocessing: a phase at high resolution sees larger views."""


def main(ckpt: list[str], out: Path, weights: list[float] | None = None) -> None:
    """Average the weights of backbones that began as the same network.

    Args:
        ckpt: Two or more backbones of one architecture, each as `--ckpt` takes it. What the new checkpoint says of recipe, data and
            sizes of views is what the last of them says; position tables are resized to the last one's.
        out: Checkpoint to write.
        weights: Of each, in the same order, together 1; all the same if not given.
    """
    if any(out.resolve() == Path(one).resolve() for one in ckpt):
        raise InputError(f"--out {out}: is one of the networks that are averaged, and would be lost; name another file")
    shares = [1 / len(ckpt)] * len(ckpt) if weights is None else weights
    backbones = [load_backbone(one) for one in ckpt]
    state = average(backbones, shares)
    manifest = _manifest(ckpt, backbones, shares)
    model = make_backbone(manifest.architecture)
    model.load_state_dict(state)
    try:
        written = save_backbone(out, model, manifest)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another place") from error
    print(f"{out}: {written.source}")


def average(backbones: Sequence[Backbone], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of all weights, fp32; a mask token is the mean over those that have one.

    Tables of positions take the last one's grid. Raises InputError where architectures or the colours of preprocessing differ, for fewer
    than two, or for weights that do not sum to 1.
    """
    _check(backbones, weights)
    states = [one.model.state_dict() for one in backbones]
    for state in states:
        if TABLE in state:
            state[TABLE] = resized(state[TABLE], states[-1][TABLE])
    mean: dict[str, Tensor] = {}
    for name in {name: None for state in states for name in state}:
        having = [
            (state[name].double(), weight) for state, weight in zip(states, weights, strict=True) if name in state
        ]
        total = sum(weight for _, weight in having)
        mean[name] = (sum(value * weight for value, weight in having) / total).to(torch.float32)
    return mean


def resized(table_1ND: Tensor, like_1MD: Tensor) -> Tensor:
    """Position encodings [1, 1 + N, D] on the grid of others."""
    return table_1ND if table_1ND.shape == like_1MD.shape else resize_table(table_1ND, like_1MD.shape[1])


def _check(backbones: Sequence[Backbone], weights: Sequence[float]) -> None:
    if len(backbones) < 2:
        raise InputError(f"--ckpt: {len(backbones)} backbone; an average needs at least 2")
    if len(weights) != len(backbones):
        raise InputError(f"--weights: {len(weights)} came for {len(backbones)} backbones; want one for each")
    if not all(weight > 0 for weight in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise InputError(f"--weights {' '.join(map(str, weights))}: want numbers above 0 that sum to 1")
    first = backbones[0].manifest
    for other in backbones[1:]:
        wanted, came = (_of_every_phase(one.architecture) for one in (first, other.manifest))
        differing = sorted(key for key in wanted.keys() | came.keys() if wanted.get(key) != came.get(key))
        if differing:
            raise InputError(
                f"--ckpt: architectures differ in {', '.join(differing)}; only copies of one network can be averaged"
            )
        if _colours(first.preprocess) != _colours(other.manifest.preprocess):
            raise InputError("--ckpt: preprocessing differs; only networks that see images alike can be averaged")


def _of_every_phase(architecture: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in architecture.items() if key not in OF_A_PHASE}


def _colours(preprocess: Preprocess) -> dict[str, object]:
    return {key: value for key, value in preprocess.to_json().items() if key not in SIZES}


def _manifest(names: Sequence[str], backbones: Sequence[Backbone], weights: Sequence[float]) -> Manifest:
    last = backbones[-1].manifest
    parts = " + ".join(
        f"{weight:g} {name} ({one.manifest.weights_sha256[:12]})"
        for name, one, weight in zip(names, backbones, weights, strict=True)
    )
    masks = any(one.manifest.architecture.get(MASK_TOKEN) for one in backbones)
    architecture = {**last.architecture, MASK_TOKEN: masks} if MASK_TOKEN in last.architecture else last.architecture
    return replace(last, architecture=architecture, source=f"average of weights: {parts}", metrics={})


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m training.average", description=__doc__))
