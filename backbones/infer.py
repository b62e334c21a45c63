"""What a network is, read off its weights: names and shapes of a state dict to the `architecture` of a manifest.

Names are those of `backbones.vit` and `backbones.resnet`. Two things cannot be read off: the number of heads, for which every published
network has one per 64 features, and how position encodings are resampled, which goes by the registers (see `backbones.position`).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from backbones.checkpoints import CheckpointError
from backbones.resnet import STAGES

HEAD_WIDTH = 64
"""Features of one attention head in every published ViT."""


def is_resnet(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are a ResNet's."""
    return "conv1.weight" in state


def infer_architecture(state: Mapping[str, Tensor], given: Mapping[str, Any], path: object) -> dict[str, Any]:
    """The `architecture` of these weights; fields of `given` are taken as they are. Raises CheckpointError."""
    inferred = _infer_resnet(state, path) if is_resnet(state) else _infer_vit(state, given, path)
    return {**inferred, **given}


def _infer_vit(state: Mapping[str, Tensor], given: Mapping[str, Any], path: object) -> dict[str, Any]:
    kernel, table = _tensor(state, "patch_embed.proj.weight", 4, path), _tensor(state, "pos_embed", 3, path)
    width, in_channels, patch_px = (int(kernel.shape[i]) for i in (0, 1, 2))
    side = math.isqrt(max(table.shape[1] - 1, 0))
    if 1 + side**2 != table.shape[1] or not side:
        raise CheckpointError(
            f"{path}: pos_embed has {table.shape[1]} rows, want 1 + a square number; only square tables with CLS are known"
        )
    registers = _tensor(state, "register_tokens", 3, path).shape[1] if "register_tokens" in state else 0
    return {
        "family": "vit",
        "patch_px": patch_px,
        "width": width,
        "depth": _depth(state, path),
        "heads": given["heads"] if "heads" in given else _usual_heads(width, path),
        "img_px": side * patch_px,
        "registers": int(registers),
        "ffn": "swiglu" if _any_ends(state, ".mlp.w12.weight") else "mlp",
        # The gain that training started from has left the weights; 1 is what the published constructors pass.
        "layer_scale": 1.0 if _any_ends(state, ".ls1.gamma") else None,
        "qkv_bias": _any_ends(state, ".attn.qkv.bias"),
        "pos_offset": 0.0 if registers else 0.1,
        "pos_antialias": bool(registers),
        "mask_token": "mask_token" in state,
        "in_channels": in_channels,
    }


def _infer_resnet(state: Mapping[str, Tensor], path: object) -> dict[str, Any]:
    blocks = tuple(
        len({name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)
    )
    for depth, stages in STAGES.items():
        if blocks == stages and "layer1.0.conv3.weight" in state:
            return {"family": "resnet", "depth": depth}
    raise CheckpointError(f"{path}: a ResNet with stages of {list(blocks)} blocks; want one of {STAGES}")


def _tensor(state: Mapping[str, Tensor], name: str, n_axes: int, path: object) -> Tensor:
    if name not in state:
        some = ", ".join(sorted(state)[:3]) or "nothing"
        raise CheckpointError(f"{path}: no weight {name}, so this is no ViT or ResNet of DINO; it holds {some}")
    if state[name].ndim != n_axes:
        raise CheckpointError(f"{path}: {name} is {list(state[name].shape)}, want {n_axes} axes")
    return state[name]


def _depth(state: Mapping[str, Tensor], path: object) -> int:
    numbers = {int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
    if not numbers or max(numbers) + 1 != len(numbers):
        gap = next(i for i in range(len(numbers) + 1) if i not in numbers)
        raise CheckpointError(f"{path}: has {len(numbers)} blocks and block {gap} is missing; was it cut short?")
    return len(numbers)


def _usual_heads(width: int, path: object) -> int:
    if width % HEAD_WIDTH:
        raise CheckpointError(
            f"{path}: weights do not tell the number of heads, and a width of {width} is no multiple of {HEAD_WIDTH} "
            f'as in published networks; write {{"heads": ...}} to {Path(str(path)).stem}.architecture.json beside it'
        )
    return width // HEAD_WIDTH


def _any_ends(state: Mapping[str, Tensor], suffix: str) -> bool:
    return any(name.endswith(suffix) for name in state)
