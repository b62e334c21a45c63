"""A backbone in the layouts of others: `python -m exports.to_huggingface --ckpt X --out FOLDER`, or `--out Y.pth`.

A folder is what transformers' `AutoModel` and `AutoImageProcessor` load: `dinov2_with_registers` with registers, `dinov2` with LayerScale,
else `vit`. A .pth file holds the names that DINO and DINOv2 publish, for code that loads their weights.

Transformers resamples position encodings by size, which equals the official networks with registers and no others. So where images of the
preprocessing's size are not the table's own, the table is written resampled to them, and what `AutoImageProcessor` prepares has the same
features there as here; `--size-px` names another side, and the table's own keeps it as it is.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from backbones.checkpoints import Backbone, load_backbone
from backbones.huggingface import BLOCK_NAMES, QKV, TOP_NAMES, VIT_BLOCK_NAMES
from backbones.infer import infer_architecture
from backbones.vit import ViT, ViTSpec
from data.errors import InputError, run_cli
from data.preprocess import Preprocess
from exports.placing import check_free, new_folder

RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Filters by Pillow's numbers, as preprocessor_config.json has them."""
CLASSES = {"vit": "ViTModel", "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}


def export_huggingface(ckpt: str | Path, out: str | Path, size_px: int | None = None) -> list[str]:
    """Write a folder, or a .pth file where `out` ends so; it appears whole or not at all. Returns notes for people.

    Raises InputError for what is in the way, or a network that the layout cannot hold.
    """
    out = Path(out)
    check_free(out)
    if out.suffix == ".pth":
        if size_px is not None:
            raise InputError("--size-px: a .pth file keeps the position table as it is; leave it out")
        return _write_pth(load_backbone(ckpt), out)
    backbone = load_backbone(ckpt)
    if not isinstance(backbone.model, ViT):
        raise InputError("transformers' folders hold ViTs here, this is a ResNet; name a .pth file with --out")
    model, preprocess = backbone.model, backbone.manifest.preprocess
    table, side_px, notes = position_table(model, preprocess, size_px)
    state = to_their_names({**model.state_dict(), "pos_embed": table}, model.spec)
    files = {
        "config.json": make_config(model.spec, side_px),
        "preprocessor_config.json": make_preprocessor_config(preprocess),
    }
    with new_folder(out) as scratch:
        for name, content in files.items():
            (scratch / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        save_file(
            {name: weight.contiguous() for name, weight in state.items()},
            scratch / "model.safetensors",
            {"format": "pt"},
        )
    return notes


def model_type(spec: ViTSpec) -> str:
    """The class of transformers that computes this network."""
    if spec.registers:
        return "dinov2_with_registers"
    return "vit" if spec.layer_scale is None and spec.ffn == "mlp" else "dinov2"


def position_table(model: ViT, preprocess: Preprocess, size_px: int | None) -> tuple[Tensor, int, list[str]]:
    """The table [1, 1 + N, D] to write, the side of the images that it is for, and what to tell people of it."""
    spec = model.spec
    native_px, patch_px = spec.grid * spec.patch_px, spec.patch_px
    same_everywhere = spec.registers > 0 and spec.pos_offset == 0 and spec.pos_antialias
    if size_px is None:
        size_px = native_px if same_everywhere else preprocess.size_px
    if size_px < patch_px or size_px % patch_px:
        raise InputError(f"--size-px {size_px}: wanted a multiple of the patch, {patch_px}")
    if size_px == native_px:
        notes = [] if same_everywhere or preprocess.size_px == native_px else [_departs(native_px, preprocess.size_px)]
        return model.pos_embed.detach(), native_px, notes
    with torch.no_grad():
        table = model.position_encoding(size_px, size_px)
    note = (
        f"position table resampled from {native_px} to {size_px} px: features equal ours at that size; "
        f"--size-px {native_px} keeps the table as it is"
    )
    return table, size_px, [note]


def _departs(native_px: int, size_px: int) -> str:
    return (
        f"position table kept at {native_px} px: transformers resamples it in its own way for images of {size_px} px, "
        "and features depart from ours there"
    )


def to_their_names(state: dict[str, Tensor], spec: ViTSpec) -> dict[str, Tensor]:
    """Weights under transformers' names; parts that its classes always have and this network lacks are written as no effect."""
    kind = model_type(spec)
    blocks = {ours: theirs for theirs, ours in (VIT_BLOCK_NAMES if kind == "vit" else BLOCK_NAMES).items()}
    tops = {ours: theirs for theirs, ours in TOP_NAMES.items()}
    theirs: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name.startswith("blocks."):
            _, i, inner = name.split(".", 2)
            stem, _, leaf = inner.rpartition(".")
            if stem == "attn.qkv":
                for part, third in zip(QKV, weight.chunk(3), strict=True):
                    theirs[f"encoder.layer.{i}.attention.attention.{part}.{leaf}"] = third
            else:
                inner = blocks[inner] if inner in blocks else f"{blocks[stem]}.{leaf}"
                theirs[f"encoder.layer.{i}.{inner}"] = weight
        elif name in tops:
            theirs[tops[name]] = weight
        else:
            stem, _, leaf = name.rpartition(".")
            theirs[f"{tops[stem]}.{leaf}"] = weight
    if kind == "vit":
        theirs.pop("embeddings.mask_token", None)
        return theirs
    theirs.setdefault("embeddings.mask_token", torch.zeros(1, spec.width))
    if spec.layer_scale is None:
        for block in range(spec.depth):
            for k in (1, 2):
                theirs[f"encoder.layer.{block}.layer_scale{k}.lambda1"] = torch.ones(spec.width)
    return theirs


def make_config(spec: ViTSpec, side_px: int) -> dict[str, Any]:
    """config.json."""
    kind = model_type(spec)
    config: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "image_size": side_px,
        "patch_size": spec.patch_px,
        "num_channels": spec.in_channels,
        "qkv_bias": spec.qkv_bias,
        "dtype": "float32",
    }
    if kind == "vit":
        return config | {"intermediate_size": 4 * spec.width}
    config |= {
        "mlp_ratio": 4,
        "layerscale_value": 1.0 if spec.layer_scale is None else spec.layer_scale,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": spec.ffn == "swiglu",
    }
    return config | ({"num_register_tokens": spec.registers} if spec.registers else {"use_mask_token": True})


def make_preprocessor_config(preprocess: Preprocess) -> dict[str, Any]:
    """preprocessor_config.json, whose crop and filter are those of `center_view`; `whole_px` is a key of ours, left alone by theirs."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.resize_px},
        "resample": RESAMPLE[preprocess.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": preprocess.size_px, "width": preprocess.size_px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "whole_px": preprocess.whole_px,
    }


def _write_pth(backbone: Backbone, out: Path) -> list[str]:
    """The published names are ours; DINOv2's networks have a mask token, DINO's have none.

    What cannot be read off the weights goes into NAME.architecture.json beside it, which our loader reads.
    """
    state, stated = published_state(backbone)
    beside = out.with_suffix(".architecture.json")
    if stated and beside.exists():
        raise InputError(f"{beside}: is there already, and would have to say what {out.name} is; delete it first")
    with new_folder(out) as scratch:
        torch.save(state, scratch / out.name)
        (scratch / out.name).chmod(0o644)
        if stated:
            (scratch / beside.name).write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n")
            os.replace(scratch / beside.name, beside)
        os.replace(scratch / out.name, out)
    return [f"{beside.name} states what the weights cannot tell: {', '.join(sorted(stated))}"] if stated else []


def published_state(backbone: Backbone) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights as published, and the fields of the architecture that cannot be read off them."""
    state = {name: weight.detach().clone() for name, weight in backbone.model.state_dict().items()}
    if not isinstance(backbone.model, ViT):
        return state, {}
    spec = backbone.model.spec
    if model_type(spec) == "vit":
        state.pop("mask_token", None)
    else:
        state.setdefault("mask_token", torch.zeros(1, spec.width))
    found = infer_architecture(state, {"heads": spec.heads}, "the exported weights")
    wanted = {"heads": spec.heads, "pos_offset": spec.pos_offset, "pos_antialias": spec.pos_antialias}
    stated = {name: value for name, value in wanted.items() if found[name] != value}
    if spec.width != 64 * spec.heads:
        stated["heads"] = spec.heads
    if spec.img_px != found["img_px"]:
        stated["img_px"] = spec.img_px
    return state, stated


def main(ckpt: str, out: Path, size_px: int | None = None) -> None:
    """Write a backbone as a Hugging Face folder, or with the published names of DINO and DINOv2.

    Args:
        ckpt: A checkpoint, published weights, a Hugging Face folder or a catalog name.
        out: The folder to write, or a file that ends in .pth; it must not be there yet.
        size_px: Side of the images that the position table is for; left out: the preprocessing's, where transformers' own
            resampling would give other features there.
    """
    notes = export_huggingface(ckpt, out, size_px)
    print(f"written: {out}")
    for note in notes:
        print(f"  {note}")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m exports.to_huggingface", description=__doc__))
