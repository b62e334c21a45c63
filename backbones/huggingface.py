"""A Hugging Face folder as a backbone: config.json, weights, and the preprocessing if it is there.

Model types `dinov2`, `dinov2_with_registers` and `vit` (the layout of DINOv1). Classifiers and poolers are left aside: they are no part
of the published backbones.

Where the transformers library departs from the official networks, the official ones are followed. It resizes position encodings by size,
which the networks without registers were not evaluated with, so off the native size features differ from transformers' (by 0.1 on the
reference network) and equal the official ones; at the native size, and with registers at every size, all three agree. Its `vit`
configurations also name a LayerNorm epsilon of 1e-12 where DINOv1 has 1e-6; 1e-6 is used.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.checkpoints import Backbone, CheckpointError, load_tensors
from backbones.published import backbone_from_state, find_state, read_json, read_pickle
from data.errors import InputError
from data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

MODEL_TYPES = ("dinov2", "dinov2_with_registers", "vit")
TOP_NAMES: dict[str, str] = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
"""Their names outside the blocks, and ours."""
BLOCK_NAMES: dict[str, str] = {
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
}
"""Their names inside block i of DINOv2, after `encoder.layer.i.`, and ours after `blocks.i.`."""
VIT_BLOCK_NAMES: dict[str, str] = {
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
"""The same for `vit`."""
QKV = ("query", "key", "value")
"""Their three linears `attention.attention.*`, in the order in which our `attn.qkv` stacks them."""
_LEFT_ASIDE = ("pooler.", "classifier.")
_WRAPPERS = ("dinov2.", "dinov2_with_registers.", "vit.")


def load_huggingface(folder: str | Path) -> Backbone:
    """Read a folder as written by transformers' `save_pretrained`. Raises CheckpointError."""
    try:
        return _load(Path(folder))
    except InputError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{folder}: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:  # weights that cannot be put together, such as bare numbers
        raise CheckpointError(f"{folder}: its weights do not make a network ({error}); download it anew") from error


def _load(folder: Path) -> Backbone:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder / 'config.json'}: no such file; give a Hugging Face folder with config.json")
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"{folder}: model type is {model_type!r}; want one of {', '.join(MODEL_TYPES)}")
    state = to_our_names(read_weights(folder), model_type, folder)
    architecture = architecture_of(config, folder, mask_token="mask_token" in state)
    found = folder / "preprocessor_config.json"
    preprocess = read_preprocess(found) if found.is_file() else None
    return backbone_from_state(state, architecture, folder, source=folder.resolve().name, preprocess=preprocess)


def architecture_of(config: Mapping[str, Any], folder: Path, *, mask_token: bool) -> dict[str, Any]:
    """Our `architecture` of a configuration; CheckpointError names the field that is missing or that we have no network for."""
    wanted = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size")
    for name in wanted:
        if type(config.get(name)) is not int:
            raise CheckpointError(f"{folder}: config.json has {name} {config.get(name)!r}, want a whole number")
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{folder}: config.json has hidden_act {config['hidden_act']!r}, want 'gelu' as in DINO")
    if config.get("layer_norm_eps", 1e-6) not in (1e-6, 1e-12):
        raise CheckpointError(f"{folder}: config.json has layer_norm_eps {config['layer_norm_eps']!r}, want 1e-06")
    gain = config.get("layerscale_value", 1.0)
    if type(gain) not in (int, float):
        raise CheckpointError(f"{folder}: config.json has layerscale_value {gain!r:.40}, want a number")
    registers = config.get("num_register_tokens", 4) if config["model_type"] == "dinov2_with_registers" else 0
    patch_px, width, depth, heads, img_px = (config[name] for name in wanted)
    return {
        "family": "vit",
        "patch_px": patch_px,
        "width": width,
        "depth": depth,
        "heads": heads,
        "img_px": img_px,
        "registers": registers,
        "ffn": "swiglu" if config.get("use_swiglu_ffn") else "mlp",
        "layer_scale": None if config["model_type"] == "vit" else gain,
        "qkv_bias": bool(config.get("qkv_bias", True)),
        "pos_offset": 0.0 if registers else 0.1,
        "pos_antialias": bool(registers),
        "mask_token": mask_token,
        "in_channels": config.get("num_channels", 3),
    }


def to_our_names(state: Mapping[str, Tensor], model_type: str, folder: Path) -> dict[str, Tensor]:
    """Weights under our names, queries, keys and values stacked; unknown names stay, for strict loading to report."""
    block_names = VIT_BLOCK_NAMES if model_type == "vit" else BLOCK_NAMES
    ours: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {}
    for name, weight in state.items():
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        if name.startswith(_LEFT_ASIDE):
            continue
        in_block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        part = (
            re.fullmatch(r"attention\.attention\.(query|key|value)\.(weight|bias)", in_block[2]) if in_block else None
        )
        if in_block and part:
            stacks.setdefault(f"blocks.{in_block[1]}.attn.qkv.{part[2]}", {})[part[1]] = weight
        elif in_block:
            ours[f"blocks.{in_block[1]}.{_rename(in_block[2], block_names)}"] = weight
        else:
            ours[_rename(name, TOP_NAMES)] = weight
    for name, parts in stacks.items():
        if missing := [part for part in QKV if part not in parts]:
            raise CheckpointError(f"{folder}: the {', '.join(missing)} of {name} is missing; was it cut short?")
        if len({parts[part].shape for part in QKV}) != 1:
            raise CheckpointError(f"{folder}: query, key and value of {name} differ in shape; want three alike")
        ours[name] = torch.cat([parts[part] for part in QKV])
    return ours


def _rename(name: str, names: Mapping[str, str]) -> str:
    stem, _, leaf = name.rpartition(".")
    if name in names:
        return names[name]
    return f"{names[stem]}.{leaf}" if stem in names else name


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: model.safetensors, its shards, or pytorch_model.bin (read without unpickling objects)."""
    for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_bin)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read(folder / name)
        if index.is_file():
            return _read_shards(folder, read_json(index).get("weight_map"), index, read)
    raise CheckpointError(
        f"{folder}: has no model.safetensors or pytorch_model.bin; give a folder as written by save_pretrained"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return load_tensors(path)[0]


def _read_bin(path: Path) -> dict[str, Tensor]:
    return dict(find_state(read_pickle(path), path))


def _read_shards(folder: Path, files: Any, index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    if not isinstance(files, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in files.values()
    ):
        raise CheckpointError(f"{index}: its weight_map does not name files of this folder; was it altered?")
    state: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        state.update(read(folder / file))
    if missing := sorted(set(files) - set(state)):
        raise CheckpointError(f"{index}: {len(missing)} weights are in none of its files, first {missing[0]}")
    return state


def read_preprocess(path: Path) -> Preprocess:
    """Our form of a preprocessor_config.json.

    Without a centre crop, transformers squashes the image to `size`; here its short side is resized to that and the middle cut out,
    which is the same for square images. `whole_px` is a key of our own exports. Raises CheckpointError for what cannot be expressed.
    """
    config = read_json(path)
    crop = bool(config.get("do_center_crop"))
    size_px = _side(config.get("crop_size") if crop else config.get("size"), path)
    resize_px = size_px
    if crop and config.get("do_resize", True):
        resize_px = _side(config.get("size"), path)
        if isinstance(config["size"], dict) and "shortest_edge" not in config["size"]:
            raise CheckpointError(
                f"{path}: images are squashed to {config['size']} before the crop; want a shortest_edge, as DINO has"
            )
    filters = {2: "bilinear", 3: "bicubic"}
    resample, factor = config.get("resample", 3), config.get("rescale_factor", 1 / 255)
    if type(resample) is not int or resample not in filters:
        raise CheckpointError(f"{path}: resample is {resample!r:.40}, want 2 (bilinear) or 3 (bicubic)")
    if type(factor) not in (int, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-4):
        raise CheckpointError(f"{path}: rescale_factor is {factor!r:.40}, want 1/255")
    if not config.get("do_rescale", True):
        raise CheckpointError(f"{path}: do_rescale is off, so pixels of 0 to 255 are wanted; here they are 0 to 1")
    normalised = config.get("do_normalize", True)
    return Preprocess(
        size_px=size_px,
        resize_px=resize_px,
        whole_px=config.get("whole_px", size_px),
        mean=config.get("image_mean", IMAGENET_MEAN) if normalised else (0.0, 0.0, 0.0),
        std=config.get("image_std", IMAGENET_STD) if normalised else (1.0, 1.0, 1.0),
        interpolation=filters[resample],  # type: ignore[arg-type]
    )


def _side(size: Any, path: Path) -> int:
    """The side that transformers means by a number, a height and width, or a shortest edge."""
    named = isinstance(size, dict) and set(size) in ({"shortest_edge"}, {"height", "width"})
    sides = list(size.values()) if named else [size]
    if any(type(side) is not int or side != sides[0] for side in sides):
        raise CheckpointError(f"{path}: a size is {size!r:.80}, want one number of pixels, as for a square")
    return int(sides[0])
