"""A backbone with its heads to a Triton model repository: `python -m exports.to_triton --ckpt X --out REPOSITORY`.

`backbone` and the heads run on ONNX Runtime, TensorRT, or ONNX Runtime inside the python backend; `embedding`, `classification`,
`attention`, `depth` and `segmentation` are ensembles that begin with encoded images; `knn` searches collections that a server of ours
has filled. Beside the models lie manifests for Kubernetes and for KServe, which Triton passes over.
Read in this order: export_triton, Repository.
"""

import ast
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import tyro

from backbones.checkpoints import Backbone, load_backbone
from backbones.network import Heads, load_heads
from backbones.vit import ViT
from data.errors import InputError, run_cli
from evaluators.classification import summary
from exports.collections_file import read_collections
from exports.graph import Value
from exports.kubernetes import write_manifests
from exports.onnx_file import PLAIN, make_model, too_large
from exports.placing import check_free, new_folder, write_file
from exports.to_onnx import check_parity
from exports.triton_config import (
    Shape,
    TritonSpec,
    as_parameter,
    config_text,
    ensemble_config,
    network_config,
    pb,
    python_config,
)
from exports.weight_writer import WeightWriter
from runtimes.onnx_graph import HeadPart, split_heads
from runtimes.onnx_runtime import HEADS_KEY
from runtimes.runtime import step_px
from runtimes.weight_file import weight_file_of

NETWORK_FILE = "model.onnx"
TEMPLATES = Path(__file__).with_name("triton_models")
ROOT = Path(__file__).resolve().parents[1]
MAX_SIZE_PX = 1024
"""Largest side that a request may ask the network to see, as in the server."""
USUAL = TritonSpec()


def export_triton(
    ckpt: str | Path,
    out: str | Path,
    spec: TritonSpec = USUAL,
    *,
    linear_head: str | Path | None = None,
    depth_head: str | Path | None = None,
    segmentation_head: str | Path | None = None,
    collections: Path | None = None,
    plan: Path | None = None,
) -> list[str]:
    """Write the repository, whole or not at all; returns the models that clients call. Raises InputError and CheckFailed."""
    out = Path(out)
    check_free(out)
    check_plan(spec, plan)
    backbone = load_backbone(ckpt)
    heads = load_heads(backbone, linear_head, depth_head, segmentation_head)
    found = {} if collections is None else read_collections(collections, backbone.manifest)
    with new_folder(out) as folder:
        whole = folder / NETWORK_FILE
        weights = WeightWriter(weight_file_of(whole)) if too_large(backbone, heads, PLAIN) else None
        model = make_model(backbone, heads, PLAIN, weights=weights)
        write_file(model, whole)
        check_parity(backbone, heads, PLAIN, whole)
        whole.unlink()
        repository = Repository(folder, backbone, heads, spec)
        network, parts = split_heads(model)
        repository.add_backbone(network, plan, {entry.key: entry.value for entry in model.metadata_props})
        for part in parts:
            repository.add_head(part)
        repository.add_views()
        served = ["backbone", *repository.add_ensembles({part.output: part for part in parts})]
        if found:
            served.append(repository.add_knn(found))
        write_manifests(folder, spec, out.name)
        (folder / "requirements.txt").write_text(requirements(spec))
    return served


def check_plan(spec: TritonSpec, plan: Path | None) -> None:
    """Raise InputError unless a plan is named exactly where one is needed."""
    if spec.engine == "tensorrt" and plan is None:
        raise InputError("--engine tensorrt: name the plan of this backbone with --plan, see exports.to_tensorrt")
    if plan is not None and (spec.engine != "tensorrt" or not plan.is_file()):
        why = "no such file" if spec.engine == "tensorrt" else f"is for --engine tensorrt, not {spec.engine}"
        raise InputError(f"--plan {plan}: {why}")


@dataclass(frozen=True)
class Repository:
    """The folder under construction."""

    folder: Path
    backbone: Backbone
    heads: Heads
    spec: TritonSpec

    @property
    def parameters(self) -> dict[str, str]:
        """What every model says of the network, as in the server."""
        return {"manifest": as_parameter(self.backbone.manifest.to_json()), "precision": "fp32"}

    def add(self, config: pb.ModelConfig) -> Path:
        """A model's folder with its configuration; returns the folder of its first version."""
        made = self.folder / config.name / "1"
        made.mkdir(parents=True)
        (made.parent / "config.pbtxt").write_text(config_text(config))
        return made

    def add_backbone(self, network: onnx.ModelProto, plan: Path | None, metadata: Mapping[str, str]) -> None:
        """The network itself; with heads on several blocks also their tokens, as further outputs.

        Weights that are too many for its file lie in the folder already, under the name that the file has for them.
        """
        weights = weight_file_of(self.folder / NETWORK_FILE)
        side = self.backbone.manifest.preprocess.size_px
        inputs, outputs = values_of(network)
        file = "model.plan" if plan else NETWORK_FILE
        warm_up = {"pixels": (3, side, side)}
        made = self.add(network_config("backbone", self.spec, inputs, outputs, file, warm_up, self.parameters))
        if plan is not None:
            shutil.copyfile(plan, made / file)
            weights.unlink(missing_ok=True)
            return
        if weights.exists():
            weights.rename(made / weights.name)
        onnx.helper.set_model_props(network, {key: value for key, value in metadata.items() if key != HEADS_KEY})
        self._save(network, made / file)

    def _save(self, model: onnx.ModelProto, path: Path) -> None:
        write_file(model, path)
        if self.spec.engine == "python":
            shutil.copyfile(TEMPLATES / "onnx_twin.py", path.with_name("model.py"))

    def add_head(self, part: HeadPart) -> None:
        """A head as a model of its own, named after what it makes. It runs on ONNX Runtime, on TensorRT's server too."""
        side = self.backbone.manifest.preprocess.size_px
        inputs, outputs = values_of(part.model)
        architecture = self.backbone.manifest.architecture
        patches = (side // step_px(self.backbone.manifest)) ** 2
        width = int(self.backbone.model.embed_dim)  # type: ignore[arg-type]
        tokens = 1 + int(architecture.get("registers", 0)) + patches
        shapes: dict[str, Shape] = {"pixels": (3, side, side), "embedding": (width,), "patches": (patches, width)}
        warm_up = {name: shapes.get(name, (tokens, width)) for name in part.inputs}
        engine = "onnxruntime" if self.spec.engine == "tensorrt" else self.spec.engine
        spec = TritonSpec(**{**vars(self.spec), "engine": engine})
        made = self.add(network_config(head_name(part), spec, inputs, outputs, "head.onnx", warm_up, {}))
        self._save(part.model, made / "head.onnx")

    def add_views(self) -> None:
        """Decoding and resizing, by the code of `data/` itself."""
        manifest = self.backbone.manifest
        told = {
            "preprocess": as_parameter(manifest.preprocess.to_json()),
            "step_px": str(step_px(manifest)),
            "max_size_px": str(MAX_SIZE_PX),
        }
        pixels: dict[str, tuple[str, Shape]] = {"pixels": ("FP32", [-1, 3, -1, -1])}
        for view in ("center", "whole"):
            made = self.add(
                python_config(
                    f"{view}_view",
                    {"image": ("BYTES", [-1])},
                    pixels,
                    self.spec.decode_instances,
                    {**told, "view": view},
                )
            )
            shutil.copyfile(TEMPLATES / "images.py", made / "model.py")
            copy_decoding(made / "data")

    def add_ensembles(self, parts: Mapping[str, HeadPart]) -> list[str]:
        """The models that take images; returns their names."""
        width = int(self.backbone.model.embed_dim)  # type: ignore[arg-type]
        rows: tuple[str, Shape] = ("FP32", [-1, width])
        self._add_template("unit_rows", "unit.py", {"raw": rows}, {"embedding": rows})
        center = ("center_view", {"image": "image"}, {"pixels": "pixels"})
        whole = ("whole_view", {"image": "image"}, {"pixels": "pixels"})
        steps = [
            center,
            ("backbone", {"pixels": "pixels"}, {"embedding": "raw"}),
            ("unit_rows", {"raw": "raw"}, {"embedding": "embedding"}),
        ]
        self.add(ensemble_config("embedding", {"embedding": rows}, steps, self.parameters))
        served = ["embedding"]
        if isinstance(self.backbone.model, ViT):
            heads = self.backbone.model.spec.heads
            maps: tuple[str, Shape] = ("FP32", [-1, heads, -1, -1])
            masks: tuple[str, Shape] = ("UINT8", [-1, heads, -1, -1])
            self._add_template("attention_mask", "mask.py", {"attention": maps}, {"mask": masks})
            steps = [
                whole,
                ("backbone", {"pixels": "pixels"}, {"attention": "attention"}),
                ("attention_mask", {"attention": "attention"}, {"mask": "mask"}),
            ]
            self.add(ensemble_config("attention", {"attention": maps, "mask": masks}, steps, self.parameters))
            served.append("attention")
        for output, (name, tensor_of, told) in self._headed().items():
            part = parts[output]
            view = center if name == "classification" else whole
            read = {tensor: tensor for tensor in part.inputs}
            made = {tensor: tensor for tensor in part.inputs if tensor != "pixels"}
            steps = [view, ("backbone", {"pixels": "pixels"}, made), (head_name(part), read, {output: output})]
            self.add(ensemble_config(name, {output: tensor_of}, steps, {**self.parameters, **told}))
            served.append(name)
        return served

    def _headed(self) -> dict[str, tuple[str, tuple[str, Shape], dict[str, str]]]:
        """Each output that a head makes: the model that serves it, its type and shape, and what is told of it."""
        found: dict[str, tuple[str, tuple[str, Shape], dict[str, str]]] = {}
        map_shape: Shape = [-1, -1, -1]
        if self.heads.linear is not None:
            head, manifest = self.heads.linear
            told = {"classes": as_parameter(list(manifest.classes))}
            found["logits"] = ("classification", ("FP32", [-1, head.spec.n_classes]), told)
        if self.heads.depth is not None:
            found["depth"] = ("depth", ("FP32", map_shape), {"unit": self.heads.depth[0].spec.unit})
        if self.heads.segmentation is not None:
            classes = list(self.heads.segmentation[1].classes)
            found["classes"] = ("segmentation", ("INT32", map_shape), {"classes": as_parameter(classes)})
        return found

    def _add_template(
        self, name: str, file: str, inputs: Mapping[str, tuple[str, Shape]], outputs: Mapping[str, tuple[str, Shape]]
    ) -> None:
        shutil.copyfile(TEMPLATES / file, self.add(python_config(name, inputs, outputs)) / "model.py")

    def add_knn(self, collections: Mapping[str, Mapping[str, np.ndarray]]) -> str:
        """The nearest items of the collections, which are files in its folder."""
        width = int(self.backbone.model.embed_dim)  # type: ignore[arg-type]
        texts: tuple[str, Shape] = ("BYTES", [-1, -1])
        config = python_config(
            "knn",
            {"image": ("BYTES", [-1]), "embedding": ("FP32", [-1, width])},
            {"ids": texts, "labels": texts, "scores": ("FP32", [-1, -1])},
            parameters=self.parameters,
            optional=True,
        )
        made = self.add(config)
        shutil.copyfile(TEMPLATES / "knn.py", made / "model.py")
        for name, arrays in collections.items():
            np.savez(made / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        return "knn"


def requirements(spec: TritonSpec) -> str:
    """What the python models import, in the versions whose decoding and resizing equal this machine's to the last bit."""
    names = ["numpy", "opencv-python-headless", "pillow"] + (["onnxruntime"] if spec.engine == "python" else [])
    installed = {str(one.metadata["Name"]).lower(): one.version for one in distributions()}
    exact = {name: installed[name] for name in names[1:3] if name in installed}
    return "".join(f"{name}=={exact[name]}\n" if name in exact else f"{name}\n" for name in names)


def head_name(part: HeadPart) -> str:
    """The internal model that makes a head's output."""
    return f"{part.output}_head"


def values_of(model: onnx.ModelProto) -> tuple[list[Value], list[Value]]:
    """Inputs and outputs of a model, each with its type and axes."""

    def value(proto: onnx.ValueInfoProto) -> Value:
        tensor = proto.type.tensor_type
        axes = tuple(dim.dim_value or dim.dim_param for dim in tensor.shape.dim)
        return Value(proto.name, tensor.elem_type, axes)

    return [value(one) for one in model.graph.input], [value(one) for one in model.graph.output]


def copy_decoding(folder: Path) -> None:
    """The modules of `data/` that decoding and resizing need, found by what they import."""
    folder.mkdir()
    waiting, copied = ["__init__", "decode", "preprocess"], set()
    while waiting:
        name = waiting.pop()
        if name in copied:
            continue
        copied.add(name)
        source = ROOT / "data" / f"{name}.py"
        shutil.copyfile(source, folder / source.name)
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("data."):
                waiting.append(str(node.module).split(".")[1])


def main(
    ckpt: str,
    out: Path,
    linear_head: Path | None = None,
    depth_head: Path | None = None,
    segmentation_head: Path | None = None,
    collections: Path | None = None,
    plan: Path | None = None,
    spec: Annotated[TritonSpec, tyro.conf.arg(name="")] = USUAL,
) -> None:
    """Write a Triton model repository.

    Args:
        ckpt: A checkpoint, published weights, a Hugging Face folder or a catalog name.
        out: The folder to write; it must not be there yet.
        linear_head: A linear classifier trained on this backbone; adds the model `classification`.
        depth_head: A depth head trained on this backbone; adds the model `depth`.
        segmentation_head: A segmentation head trained on this backbone; adds the model `segmentation`.
        collections: Folder that a server keeps its collections in; those of this backbone become the model `knn`.
        plan: A TensorRT plan of this backbone, for --engine tensorrt.
        spec: How the models run inside Triton.
    """
    served = export_triton(
        ckpt,
        out,
        spec,
        linear_head=linear_head,
        depth_head=depth_head,
        segmentation_head=segmentation_head,
        collections=collections,
        plan=plan,
    )
    print(f"written: {out} ({spec.engine}); models: {', '.join(served)}")
    print(f"  tritonserver --model-repository={out}")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m exports.to_triton", description=summary(__doc__)))
