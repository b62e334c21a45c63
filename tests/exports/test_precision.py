"""Lower precisions: what is in the files, the drift they carry, and the gates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from backbones.checkpoints import load_backbone
from data.errors import CheckFailed, InputError
from data.preprocess import center_view, whole_view
from exports.calibration import best_range
from exports.drift import Drift, Tolerance, check_drift, measure_drift, open_parts
from exports.graph import DYNAMIC_LEVELS, Precision, quantise
from exports.onnx_file import OnnxSpec
from exports.to_onnx import export_onnx
from exports.to_tensorrt import check_graph
from runtimes.onnx_runtime import EXPORT_KEY, OnnxRuntime
from runtimes.torch_runtime import TorchRuntime
from tests.exports.artifacts import artifact

LOW: tuple[Precision, ...] = ("fp16", "int8", "int8-static")
ANY = Tolerance(min_cosine=0.0, max_knn_loss=1.0)


def export(name: str, precision: Precision, data: Path, out: Path, **options: object) -> dict:
    given = {"data": str(data), "tolerance": ANY} | options
    export_onnx(artifact(name).ckpt, out, spec=OnnxSpec(precision=precision), **given)  # type: ignore[arg-type]
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    return json.loads({entry.key: entry.value for entry in model.metadata_props}[EXPORT_KEY])


@pytest.mark.parametrize("name", ["v1", "v2", pytest.param("resnet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", LOW)
def test_a_lower_precision_is_close_smaller_and_says_how_close(
    name: str, precision: Precision, pictures: Path, tmp_path: Path
) -> None:
    if (name, precision) == ("resnet", "int8"):
        pytest.skip("refused, see below")
    told = export(name, precision, pictures, tmp_path / "x.onnx")
    assert told["precision"] == precision
    if precision != "int8":
        check_graph(onnx.load(tmp_path / "x.onnx"))  # as TensorRT takes it
    backbone = load_backbone(artifact(name).ckpt)
    with TorchRuntime(backbone, device="cpu") as before, OnnxRuntime(tmp_path / "x.onnx") as after:
        assert after.precision == precision
        again = measure_drift(before, after, str(pictures))
        given = np.random.default_rng(1).standard_normal((2, 3, *(2 * [2 * artifact(name).step_px])), dtype=np.float32)
        made = after.run(given, after.outputs)
    assert told["drift"]["images"] == again.images == 52
    assert told["drift"]["cosine_mean"] == pytest.approx(again.cosine_mean, abs=1e-6)
    assert told["drift"]["knn_images"] == 52
    assert told["drift"]["cosine_mean"] > {"fp16": 0.9999, "int8": 0.99, "int8-static": 0.95}[precision]
    assert told["drift"]["cosine_mean"] < 1 - 1e-9, "it is computed in another precision"
    assert {array.dtype for array in made.values()} == {np.dtype(np.float32)}
    size = (tmp_path / "x.onnx").stat().st_size
    if name == "resnet":
        assert size < 0.6 * artifact(name).onnx.stat().st_size


def test_half_is_kept_from_norms_softmax_inputs_and_outputs(pictures: Path, tmp_path: Path) -> None:
    export("v2", "fp16", pictures, tmp_path / "x.onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "x.onnx"), data_prop=True)
    types = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    seen: dict[str, set[int]] = {}
    for node in model.graph.node:
        seen.setdefault(node.op_type, set()).add(types[node.input[0]])
    full, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    assert seen["LayerNormalization"] == seen["Softmax"] == {full}
    assert seen["Conv"] == {half}
    assert half in seen["MatMul"]
    assert {types[v.name] for v in (*model.graph.input, *model.graph.output)} == {full}


def test_static_scales_are_symmetric_as_tensorrt_wants_them(pictures: Path, tmp_path: Path) -> None:
    export("v1", "int8-static", pictures, tmp_path / "x.onnx")
    graph = onnx.load(tmp_path / "x.onnx").graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len([node for node in pairs if node.op_type == "QuantizeLinear"]) == 8  # four linear layers in two blocks
    for node in pairs:
        zero = values[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (values[node.input[1]] > 0).all()
    assert not any(array.dtype == np.int32 for array in values.values()), "biases stay floats"


def test_more_drift_than_allowed_is_refused_and_nothing_is_written(pictures: Path, tmp_path: Path) -> None:
    strict = Tolerance(min_cosine=1.0)
    with pytest.raises(CheckFailed, match=r"mean cosine of 0\.\d+ .* wanted at least 1\.0; nothing was written"):
        export("v1", "int8", pictures, tmp_path / "x.onnx", tolerance=strict)
    assert list(tmp_path.iterdir()) == []


def test_what_is_lost_in_accuracy_is_what_counts_not_what_is_won(pictures: Path, tmp_path: Path) -> None:
    fields = {"images": 52, "cosine_mean": 0.999, "cosine_min": 0.99, "knn_images": 200}
    check_drift(Drift(**fields, knn_before=0.5, knn_after=0.6), Tolerance())
    check_drift(Drift(**fields, knn_before=0.5, knn_after=0.495), Tolerance())
    check_drift(Drift(**fields), Tolerance())
    with pytest.raises(CheckFailed, match=r"falls by 1\.00 points, from 50\.00 to 49\.00; allowed 0\.50"):
        check_drift(Drift(**fields, knn_before=0.5, knn_after=0.49), Tolerance())


def test_images_without_labels_give_angles_only(pictures: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for k, path in enumerate(sorted(pictures.glob("train/*/*.png"))):
        (flat / f"{k}.png").write_bytes(path.read_bytes())
    told = export("v1", "fp16", flat, tmp_path / "x.onnx")
    assert told["drift"]["images"] == 40
    assert told["drift"]["knn_before"] is None


@pytest.mark.parametrize("precision", LOW)
def test_a_lower_precision_wants_images(precision: Precision, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--precision {precision}: name real images with --data"):
        export_onnx(artifact("v1").ckpt, tmp_path / "x.onnx", spec=OnnxSpec(precision=precision))


def test_too_few_images_are_refused(pictures: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    for label in ("across", "along"):
        for split, n in (("train", 5), ("val", 1)):
            (few / split / label).mkdir(parents=True)
            for path in sorted((pictures / split / label).glob("*.png"))[:n]:
                (few / split / label / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="10 calibration images; wanted at least 32"):
        export("v1", "int8-static", few, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_dynamic_int8_rounds_each_image_by_itself_and_leaves_the_first_block_alone(
    pictures: Path, tmp_path: Path
) -> None:
    export("v2", "int8", pictures, tmp_path / "x.onnx")
    model = onnx.load(tmp_path / "x.onnx")
    whole = {node.input[1] for node in model.graph.node if node.op_type == "MatMulInteger"}
    assert {name.rsplit(".", 2)[0] for name in whole} == {"blocks.1.attn", "blocks.1.mlp"}
    assert len(whole) == 4
    pixels = np.random.default_rng(0).standard_normal((3, 3, 14, 21), dtype=np.float32)
    pixels[1] *= 20  # what would widen the range of its neighbours
    with OnnxRuntime(tmp_path / "x.onnx") as found:
        together = found.run(pixels)["embedding"]
        for k in range(3):
            np.testing.assert_array_equal(found.run(pixels[k : k + 1])["embedding"][0], together[k])


def test_accuracy_is_judged_on_all_images_training_images_by_the_others(pictures: Path) -> None:
    class Shifted(TorchRuntime):
        """Training images of one class look like the other; test images do not change."""

        def run(self, pixels_NCHW: np.ndarray, outputs: Any = ("embedding",)) -> dict[str, np.ndarray]:
            return {"embedding": np.array([vectors[image.tobytes()] for image in pixels_NCHW], np.float32)}

    splits, _ = open_parts(str(pictures))
    backbone = load_backbone(artifact("v1").ckpt)
    vectors: dict[bytes, list[float]] = {}
    for part, wrong in ((splits.train, 4), (splits.val, 0)):
        for row in range(len(part)):
            label = part.items[row].label == "along"
            turned = label != (row < wrong)
            vectors[center_view(part.image(row), backbone.manifest.preprocess).tobytes()] = [turned, not turned]
    drift = measure_drift(Shifted(backbone, device="cpu"), Shifted(backbone, device="cpu"), str(pictures))
    assert drift.knn_images == 52
    assert drift.knn_before == drift.knn_after == pytest.approx(48 / 52)  # four training images, no test image


def test_dynamic_int8_is_not_for_convolutions(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--precision int8 is for ViTs"):
        export("resnet", "int8", pictures, tmp_path / "x.onnx")


# --- fixed sizes and images of 8 bits ---------------------------------------------------------------------------------


def test_a_fixed_size_is_baked_in_and_becomes_the_preprocessings(tmp_path: Path) -> None:
    for name, side in (("v1", 40), ("v2", 21), ("resnet", 64)):
        export_onnx(artifact(name).ckpt, tmp_path / f"{name}.onnx", spec=OnnxSpec(fixed_px=(side, side)))
        backbone = load_backbone(artifact(name).ckpt)
        kinds = {node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node}
        assert not kinds & {"Range", "Where"}, "positions are stored, not computed"
        pixels = np.random.default_rng(0).standard_normal((3, 3, side, side), dtype=np.float32)
        with TorchRuntime(backbone, device="cpu") as wanted, OnnxRuntime(tmp_path / f"{name}.onnx") as found:
            assert found.manifest.preprocess.size_px == found.manifest.preprocess.whole_px == side
            for output, array in wanted.run(pixels, wanted.outputs).items():
                got = found.run(pixels, (output,))[output]
                np.testing.assert_allclose(got, array, atol=5e-5 * np.abs(array).max())
            with pytest.raises(InputError, match=f"this file takes images of {side}x{side} only"):
                found.run(pixels[:, :, : artifact(name).step_px])


def test_a_fixed_size_need_not_be_square(tmp_path: Path) -> None:
    export_onnx(artifact("v1").ckpt, tmp_path / "x.onnx", spec=OnnxSpec(fixed_px=(16, 48)))
    with OnnxRuntime(tmp_path / "x.onnx") as found:
        assert found.run(np.zeros((1, 3, 16, 48), np.float32), ("attention",))["attention"].shape == (1, 2, 2, 6)


@pytest.mark.parametrize("sides", [(20, 24), (0, 8), (8, 8192), (24, -8)])
def test_a_fixed_size_of_parts_of_patches_is_refused(sides: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"wanted multiples of the patch, 8, from 8 to 4096; nearest: "):
        export_onnx(artifact("v1").ckpt, tmp_path / "x.onnx", spec=OnnxSpec(fixed_px=sides))
    assert list(tmp_path.iterdir()) == []


def test_decoded_images_go_in_as_they_are(tmp_path: Path) -> None:
    import onnxruntime as ort

    v1 = artifact("v1")
    export_onnx(v1.ckpt, tmp_path / "x.onnx", v1.depth_head, spec=OnnxSpec(uint8=True))
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), np.uint8)
    plain = ort.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in plain.get_outputs()]
    made = dict(zip(names, plain.run(names, {"pixels": images}), strict=True))
    backbone = load_backbone(v1.ckpt)
    mean, std = (
        np.array(v, np.float32)[:, None, None]
        for v in (backbone.manifest.preprocess.mean, backbone.manifest.preprocess.std)
    )
    pixels = (images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) - mean) / std
    with OnnxRuntime(v1.onnx) as wanted, OnnxRuntime(tmp_path / "x.onnx") as found:
        for name, array in wanted.run(pixels, wanted.outputs).items():
            np.testing.assert_allclose(made[name], array, atol=1e-5 * np.abs(array).max())
            np.testing.assert_allclose(found.run(pixels, (name,))[name], array, atol=1e-5 * np.abs(array).max())
        with pytest.raises(InputError, match="takes images of 8 bits"):
            found.run(np.full((1, 3, 24, 24), 9.0, np.float32))


def test_every_view_of_an_image_survives_the_way_through_8_bits(tmp_path: Path) -> None:
    v1 = artifact("v1")
    export_onnx(v1.ckpt, tmp_path / "x.onnx", spec=OnnxSpec(uint8=True))
    image = np.random.default_rng(0).integers(0, 256, (61, 47, 3), np.uint8)
    with OnnxRuntime(v1.onnx) as wanted, OnnxRuntime(tmp_path / "x.onnx") as found:
        for view in (center_view, whole_view):
            pixels = view(image, wanted.manifest.preprocess)[None]
            np.testing.assert_allclose(found.run(pixels)["embedding"], wanted.run(pixels)["embedding"], atol=1e-5)


# --- parts --------------------------------------------------------------------------------------------------------------


def test_a_weight_is_off_by_half_a_step_at_most() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32) * np.array(
        [1, 10, 100, 1e-3, 1, 1, 1, 0], np.float32
    )
    whole, scale = quantise(weight, 1, DYNAMIC_LEVELS)
    assert np.abs(whole).max() == DYNAMIC_LEVELS
    assert (np.abs(whole * scale - weight) <= scale / 2 * 1.001).all()


def test_one_stray_value_does_not_widen_the_range_of_all_others() -> None:
    usual = np.abs(np.random.default_rng(0).standard_normal(100_000))
    assert best_range(np.append(usual, 8.0)) < 6
    assert best_range(np.full(10, 3.0)) == pytest.approx(3.0)
    assert best_range(np.zeros(5)) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("images", ["photos", "clipart", "objects"])
@pytest.mark.parametrize("precision", LOW)
def test_the_bundled_backbone_keeps_its_accuracy_in_every_precision(
    precision: Precision, images: str, shared_data: Path, repo_root: Path, tmp_path: Path
) -> None:
    ckpt = repo_root / "models" / "dinoscope_tiny.safetensors"
    spec, data = OnnxSpec(precision=precision), str(shared_data / images)
    done = export_onnx(ckpt, tmp_path / "x.onnx", spec=spec, data=data)
    assert done.drift is not None
    assert done.drift.cosine_mean >= 0.995
    assert (done.drift.knn_loss or 0) <= 0.005
