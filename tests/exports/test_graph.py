"""What is in an exported file: names, sizes that may vary, weights once, the manifest, and nothing of this machine."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from backbones.checkpoints import Backbone, load_backbone
from backbones.vit import ViT
from exports.graph import OPSET
from exports.to_onnx import TOLERANCE, relative_difference
from runtimes.onnx_graph import split_heads
from runtimes.onnx_runtime import OnnxRuntime
from runtimes.open import open_runtime
from runtimes.torch_runtime import TorchRuntime
from tests.exports.artifacts import Artifact, artifact


def pixels(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, height, width), dtype=np.float32)


def test_the_parity_that_was_checked_covers_every_output_and_several_sizes(exported: Artifact) -> None:
    assert tuple(exported.parity.differences) == exported.outputs
    assert 0 < max(exported.parity.differences.values()) < TOLERANCE / 10
    assert len({n for n, _, _ in exported.parity.cases}) > 1
    assert any(height != width for _, height, width in exported.parity.cases)
    assert (1, exported.step_px, exported.step_px) in exported.parity.cases


def test_inputs_outputs_and_axes_have_the_names_of_the_contract(exported: Artifact) -> None:
    graph = onnx.load(exported.onnx).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    d, heads = {"v1": (32, 2), "v2": (32, 4), "resnet": (2048, 0)}[exported.onnx.stem]
    contract = {
        "pixels": ["N", 3, "H", "W"],
        "embedding": ["N", d],
        "patches": ["N", "patches", d],
        "attention": ["N", heads, "h", "w"],
        "depth": ["N", "H", "W"],
    }
    assert shapes == {name: contract[name] for name in ("pixels", *exported.outputs)}
    assert [value.name for value in graph.output] == list(exported.outputs)
    types = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types == {onnx.TensorProto.FLOAT}


def test_the_file_passes_onnxs_own_checker(exported: Artifact) -> None:
    onnx.checker.check_model(str(exported.onnx), full_check=True)


def test_the_file_needs_nothing_but_the_standard_operators_of_one_version(exported: Artifact) -> None:
    model = onnx.load(exported.onnx)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}


def test_every_weight_is_stored_once_and_the_file_is_no_larger_than_its_weights(exported: Artifact) -> None:
    model = onnx.load(exported.onnx, load_external_data=False)
    weights = load_backbone(exported.ckpt).model.state_dict()
    wanted = sum(weight.numel() * weight.element_size() for weight in weights.values())
    if exported.depth_head is not None:
        wanted += exported.depth_head.stat().st_size
    arrays = [onnx.numpy_helper.to_array(initializer) for initializer in model.graph.initializer]
    stored = sum(array.nbytes for array in arrays)
    assert 0.9 * wanted < stored <= wanted + 4096
    assert exported.onnx.stat().st_size < stored + 65_536
    large = [array.tobytes() for array in arrays if array.nbytes > 1024]
    assert len(set(large)) == len(large)
    assert not any(initializer.external_data for initializer in model.graph.initializer)


def test_nothing_of_the_machine_that_exported_it_is_in_the_file(exported: Artifact, repo_root: Path) -> None:
    content = exported.onnx.read_bytes()
    for word in (str(repo_root), "site-packages", "stack_trace", 'File "', str(exported.ckpt.parent)):
        assert word.encode() not in content


def test_the_manifests_come_back(exported: Artifact) -> None:
    with OnnxRuntime(exported.onnx) as found:
        assert found.manifest == load_backbone(exported.ckpt).manifest
        assert found.outputs == exported.outputs
        if exported.depth_head is None:
            assert found.heads == {}
        else:
            assert found.heads["depth"]["spec"]["unit"] == "furlong"
            assert found.heads["depth"]["backbone_sha256"] == found.manifest.weights_sha256


@pytest.mark.parametrize(
    ("n", "h", "w"), [(1, 1, 1), (4, 1, 1), (1, 1, 6), (2, 5, 1), (1, 3, 3), (3, 2, 2), (2, 3, 2), (1, 9, 1), (7, 4, 3)]
)
def test_any_batch_height_and_width_of_whole_patches(exported: Artifact, n: int, h: int, w: int) -> None:
    given = pixels(n, h * exported.step_px, w * exported.step_px)
    options = {"device": "cpu", "threads": 1}
    with (
        open_runtime(exported.ckpt, depth_head=exported.depth_head, **options) as wanted,  # type: ignore[arg-type]
        open_runtime(exported.onnx, **options) as found,  # type: ignore[arg-type]
    ):
        expected, got = wanted.run(given, exported.outputs), found.run(given, exported.outputs)
    for name in exported.outputs:
        assert relative_difference(got[name], expected[name]) < TOLERANCE / 4, name
    if "attention" in got:
        assert got["attention"].shape[2:] == (h, w)
        assert (got["attention"].sum(axis=(2, 3)) < 1).all()


def test_the_position_table_is_used_as_it_is_at_its_own_size_and_resampled_elsewhere(v1: Artifact) -> None:
    # With offset 0 resampling to the table's own size is the identity; with the offset 0.1 of these weights it is not.
    # So the file agrees with a network of offset 0 at the native size if and only if it takes the table as it is there.
    backbone = load_backbone(v1.ckpt)
    other = ViT(dataclasses.replace(backbone.model.spec, pos_offset=0.0)).eval()  # type: ignore[arg-type]
    other.load_state_dict(backbone.model.state_dict())
    with TorchRuntime(Backbone(other, backbone.manifest), device="cpu") as plain, OnnxRuntime(v1.onnx) as found:
        for h, w, same in ((3, 3, True), (1, 9, False), (9, 1, False), (3, 4, False), (4, 4, False), (2, 3, False)):
            given = pixels(1, 8 * h, 8 * w)
            difference = relative_difference(*(r.run(given, ("patches",))["patches"] for r in (found, plain)))
            assert (difference < TOLERANCE) == same, (h, w, difference)


def with_trap(model: onnx.ModelProto, output: str, path: Path) -> Path:
    """The same graph with a look-up at the end of one output that fails whenever it is run."""
    for node in model.graph.node:
        for k, name in enumerate(node.output):
            if name == output:
                node.output[k] = "before"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([10**6]), "nowhere"))
    model.graph.node.append(onnx.helper.make_node("Gather", ["before", "nowhere"], [output], axis=0))
    onnx.save(model, path)
    return path


def test_the_depth_head_runs_only_where_depth_is_asked_for(v1: Artifact, tmp_path: Path) -> None:
    # ONNX Runtime runs the whole of a graph whatever is fetched, so this holds only because the head is a graph apart
    trapped = with_trap(onnx.load(v1.onnx), "depth", tmp_path / "trap.onnx")
    with OnnxRuntime(trapped) as trap, OnnxRuntime(v1.onnx) as whole:
        given = pixels(1, 24, 24)
        for outputs in (("embedding",), ("patches", "attention")):
            for name, array in trap.run(given, outputs).items():
                np.testing.assert_array_equal(array, whole.run(given, outputs)[name])
        with pytest.raises(Exception, match="Gather"):
            trap.run(given, ("depth",))


def test_no_weight_is_in_both_halves_of_a_split_graph(v1: Artifact) -> None:
    model = onnx.load(v1.onnx)
    backbone, (depth,) = split_heads(model)
    head = depth.model
    assert (depth.output, depth.inputs) == ("depth", ("pixels", "embedding", "patches"))
    for part in (backbone, head):
        onnx.checker.check_model(part, full_check=True)
    weights = [{i.name for i in part.graph.initializer if len(i.raw_data) > 256} for part in (backbone, head)]
    assert weights[0].isdisjoint(weights[1])
    assert weights[0] | weights[1] == {i.name for i in model.graph.initializer if len(i.raw_data) > 256}
    assert [output.name for output in backbone.graph.output] == ["embedding", "patches", "attention"]
    assert len(head.graph.node) < len(backbone.graph.node) / 2


def test_the_weights_are_those_of_the_checkpoint_to_the_last_bit(v1: Artifact) -> None:
    stored = {
        initializer.name: onnx.numpy_helper.to_array(initializer)
        for initializer in onnx.load(v1.onnx).graph.initializer
    }
    projection = "patch_embed.weight"
    wanted = load_backbone(v1.ckpt).model.state_dict()["patch_embed.proj.weight"]
    assert torch.equal(torch.from_numpy(stored[projection].copy()), wanted)


def test_networks_are_exported_apart() -> None:
    assert artifact("v1").onnx != artifact("v2").onnx
    with OnnxRuntime(artifact("v1").onnx) as one, OnnxRuntime(artifact("v2").onnx) as other:
        assert one.manifest.weights_sha256 != other.manifest.weights_sha256
