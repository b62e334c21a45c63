"""What is in an exported repository: configurations that Triton's own message types read and that fit the files, manifests, refusals."""

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from backbones.checkpoints import load_backbone
from data.errors import InputError
from exports import to_triton
from exports.collections_file import read_collections
from exports.to_triton import export_triton
from exports.triton_config import TritonSpec
from tests.exports.artifacts import artifact
from tests.exports.test_heads_in_graph import heads_of_another_backbone, make_head_file

SERVED = {"backbone", "embedding", "attention", "classification", "depth", "segmentation"}
INTERNAL = {"center_view", "whole_view", "unit_rows", "attention_mask", "logits_head", "depth_head", "classes_head"}


@pytest.fixture(scope="module", params=["onnxruntime", "tensorrt", "python"])
def repository(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network with its heads, for each engine in turn."""
    folder = tmp_path_factory.mktemp("triton")
    v1 = artifact("v1")
    segmentation = make_head_file(v1.ckpt, "segmentation", {"layers": (0, 1)}, folder / "segmentation.safetensors")
    linear = make_head_file(v1.ckpt, "linear", {"features": "cls+patch_mean"}, folder / "linear.safetensors")
    plan = None
    if request.param == "tensorrt":
        plan = folder / "any.plan"
        plan.write_bytes(b"stands for a plan, which nothing here can read")
    spec = TritonSpec(engine=request.param, device="gpu" if plan else "cpu", instances=2, threads=3, max_batch=16)
    heads = {"linear_head": linear, "depth_head": v1.depth_head, "segmentation_head": segmentation}
    export_triton(v1.ckpt, folder / "out", spec, **heads, plan=plan)
    return folder / "out"


def read_configs(repository: Path) -> dict[str, Any]:
    return {
        path.parent.name: text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        for path in repository.glob("*/config.pbtxt")
    }


def test_every_configuration_is_tritons_and_names_its_folder(repository: Path) -> None:
    configs = read_configs(repository)
    assert set(configs) == SERVED | INTERNAL
    for name, config in configs.items():
        assert config.name == name
        assert config.version_policy.latest.num_versions == 1
        assert (repository / name / "1").is_dir()
        assert bool(config.backend) != (config.platform == "ensemble")


def test_the_networks_configurations_fit_their_files(repository: Path) -> None:
    configs = read_configs(repository)
    engine = configs["backbone"].backend
    types = {1: model_config_pb2.TYPE_FP32, 6: model_config_pb2.TYPE_INT32}
    for name, file in (
        ("backbone", "model.onnx"),
        ("logits_head", "head.onnx"),
        ("depth_head", "head.onnx"),
        ("classes_head", "head.onnx"),
    ):
        config = configs[name]
        assert config.max_batch_size == 16
        assert config.dynamic_batching.default_queue_policy.max_queue_size == 256
        assert [sample.batch_size for sample in config.model_warmup] == [1, 16]
        assert config.instance_group[0].count == 2
        if name == "backbone" and engine == "tensorrt":
            assert config.platform == "tensorrt_plan"
            assert config.default_model_filename == "model.plan"
            assert (repository / name / "1" / "model.plan").is_file()
            continue
        assert config.backend == ("python" if engine == "python" else "onnxruntime")
        assert config.parameters["intra_op_thread_count"].string_value == "3"
        graph = onnx.load(repository / name / "1" / file).graph
        for told, real in ((config.input, graph.input), (config.output, graph.output)):
            assert [one.name for one in told] == [one.name for one in real]
            for one, value in zip(told, real, strict=True):
                tensor = value.type.tensor_type
                assert one.data_type == types[tensor.elem_type]
                assert list(one.dims) == [dim.dim_value or -1 for dim in tensor.shape.dim][1:]


def test_each_ensemble_is_wired_to_what_its_models_have(repository: Path) -> None:
    configs = read_configs(repository)
    for name in SERVED - {"backbone"}:
        config = configs[name]
        assert config.platform == "ensemble"
        known = {one.name for one in config.input}
        assert known == {"image"}
        for step in config.ensemble_scheduling.step:
            model = configs[step.model_name]
            assert set(step.input_map) == {one.name for one in model.input}
            assert set(step.output_map) <= {one.name for one in model.output}
            assert set(step.input_map.values()) <= known
            known |= set(step.output_map.values())
        assert {one.name for one in config.output} <= known


def test_what_clients_are_told_of_the_network_is_the_manifest(repository: Path) -> None:
    configs = read_configs(repository)
    manifest = load_backbone(artifact("v1").ckpt).manifest.to_json()
    for name in SERVED:
        assert json.loads(configs[name].parameters["manifest"].string_value) == manifest
    assert configs["depth"].parameters["unit"].string_value == "furlong"
    for name in ("classification", "segmentation"):
        assert json.loads(configs[name].parameters["classes"].string_value) == list("abcde")


def test_the_decoding_beside_the_models_runs_by_itself_and_is_the_servers(repository: Path, tmp_path: Path) -> None:
    code = (
        "import io, numpy as np; from PIL import Image; from data.decode import decode_image; "
        "from data.preprocess import Preprocess, whole_view; file = io.BytesIO(); "
        "Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(file, 'PNG'); "
        "print(whole_view(decode_image(file.getvalue()), Preprocess()).shape, decode_image.__code__.co_filename)"
    )
    folder = repository / "center_view" / "1"
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("(3, 224, 224)")
    assert str(folder) in ended.stdout


def test_a_server_of_ours_takes_the_same_repository(repository: Path, tmp_path: Path) -> None:
    from server.artifacts import load_artifacts
    from tests.server.conftest import config_of

    if not (repository / "backbone" / "1" / "model.onnx").is_file():
        with pytest.raises(InputError, match="holds no backbone"):
            load_artifacts(config_of(repository, tmp_path))
        return
    loaded = load_artifacts(config_of(repository, tmp_path))
    assert loaded.runtimes[0].outputs[:3] == ("embedding", "patches", "attention")
    assert loaded.version == "1"


# --- manifests for a cluster ------------------------------------------------------------------------------------------

_RESOURCES = {"type": "object", "additionalProperties": False, "properties": {"requests": {}, "limits": {}}}
INFERENCE_SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "serving.kserve.io/v1beta1"},
        "kind": {"const": "InferenceService"},
        "metadata": {
            "required": ["name"],
            "properties": {"name": {"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}},
        },
        "spec": {
            "required": ["predictor"],
            "additionalProperties": False,
            "properties": {
                "predictor": {
                    "additionalProperties": False,
                    "required": ["model"],
                    "properties": {
                        "minReplicas": {"type": "integer"},
                        "maxReplicas": {"type": "integer"},
                        "scaleMetric": {"enum": ["cpu", "memory", "concurrency", "rps"]},
                        "scaleTarget": {"type": "integer"},
                        "model": {
                            "additionalProperties": False,
                            "required": ["modelFormat", "storageUri"],
                            "properties": {
                                "modelFormat": {"required": ["name"], "properties": {"name": {"type": "string"}}},
                                "protocolVersion": {"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]},
                                "runtime": {"type": "string"},
                                "storageUri": {"pattern": "^(pvc|s3|gs|https?)://"},
                                "resources": _RESOURCES,
                            },
                        },
                    },
                }
            },
        },
    },
}
"""The fields of KServe's v1beta1 InferenceService that are used here; its full definition lives in the cluster."""


def test_the_objects_for_a_cluster_are_valid(repository: Path) -> None:
    listed = json.loads((repository / "kubernetes.yaml").read_text())
    assert [one["kind"] for one in listed["items"]] == ["Deployment", "Service", "HorizontalPodAutoscaler"]
    for one in listed["items"]:
        kubernetes_validate.validate(one, "1.30", strict=True)
    jsonschema.validate(json.loads((repository / "inferenceservice.yaml").read_text()), INFERENCE_SERVICE)
    limits = listed["items"][0]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    on_gpu = read_configs(repository)["backbone"].instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert ("nvidia.com/gpu" in limits) == on_gpu


def test_the_schema_would_notice_a_slip(repository: Path) -> None:
    (deployment, *_) = json.loads((repository / "kubernetes.yaml").read_text())["items"]
    deployment["spec"]["template"]["spec"]["containers"][0]["port"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.30", strict=True)


# --- collections ------------------------------------------------------------------------------------------------------


def test_collections_of_another_network_or_none_are_refused(tmp_path: Path) -> None:
    manifest = load_backbone(artifact("v1").ckpt).manifest
    with pytest.raises(InputError, match="holds no collections"):
        read_collections(tmp_path, manifest)
    (tmp_path / "collections.sqlite").write_bytes(b"this is no database, it is text")
    with pytest.raises(InputError, match="cannot be read"):
        read_collections(tmp_path, manifest)
    (tmp_path / "collections.sqlite").unlink()
    with sqlite3.connect(tmp_path / "collections.sqlite") as db:
        db.execute("CREATE TABLE collections (name, weights_sha256, preprocess)")
        db.execute("CREATE TABLE items (sequence, collection, id, label, vector)")
        db.execute("INSERT INTO collections VALUES ('theirs', 'abc', '{}')")
    with pytest.raises(InputError, match="none of its 1 collections was filled by this network"):
        read_collections(tmp_path, manifest)
    with sqlite3.connect(tmp_path / "collections.sqlite") as db:
        seen = json.dumps(manifest.preprocess.to_json(), sort_keys=True)
        db.execute("INSERT INTO collections VALUES ('ours', ?, ?)", (manifest.weights_sha256, seen))
        vector = np.array([3, 4], "<f4").tobytes()
        db.executemany("INSERT INTO items VALUES (?, 'ours', ?, ?, ?)", [(2, "b", None, vector), (1, "a", "x", vector)])
    found = read_collections(tmp_path, manifest)
    assert list(found) == ["ours"]
    assert found["ours"]["ids"].tolist() == ["a", "b"]
    assert found["ours"]["labels"].tolist() == ["x", ""]
    np.testing.assert_allclose(found["ours"]["unit"], [[0.6, 0.8], [0.6, 0.8]])


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_nothing_is_left(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = artifact("v1").ckpt
    others = heads_of_another_backbone(tmp_path_factory.mktemp("others"))
    (tmp_path / "taken").mkdir()
    tensorrt = TritonSpec(engine="tensorrt")
    for spec, options, out, words in (
        (TritonSpec(), {}, "taken", "is there already"),
        (tensorrt, {}, "x", "name the plan of this backbone with --plan"),
        (tensorrt, {"plan": tmp_path / "none.plan"}, "x", "no such file"),
        (TritonSpec(), {"plan": ckpt}, "x", "is for --engine tensorrt, not onnxruntime"),
        (TritonSpec(), {"collections": tmp_path}, "x", "holds no collections"),
        (TritonSpec(), {"depth_head": ckpt}, "x", "not a head"),
        (TritonSpec(), {"depth_head": others["depth"]}, "x", r"depth\.safetensors: this head fits the backbone"),
        (TritonSpec(), {"segmentation_head": others["segmentation"]}, "x", "this head fits the backbone"),
        (
            TritonSpec(),
            {"segmentation_head": artifact("v1").depth_head},
            "x",
            "is a depth head; wanted a segmentation head",
        ),
    ):
        with pytest.raises(InputError, match=words):
            export_triton(ckpt, tmp_path / out, spec, **options)
    for field in ("instances", "threads", "max_batch"):
        with pytest.raises(InputError, match="0: wanted at least 1"):
            TritonSpec(**{field: 0})
    monkeypatch.setattr(to_triton, "write_manifests", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_triton(ckpt, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    shutil.rmtree(tmp_path / "taken")
