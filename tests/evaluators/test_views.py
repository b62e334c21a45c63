"""What the network is shown and what is made of its tokens: the official feature combinations, pooling, scales and sizes."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from data.datasets import open_dataset
from data.errors import InputError
from data.preprocess import Preprocess, fit_view
from evaluators.extract import ExtractSpec, extract, features_of
from evaluators.view_batches import ViewSpec, decoded_batches
from runtimes.torch_runtime import TorchRuntime
from tests.backbones.nets import load_reference
from tests.evaluators.fakes import SMALL, MeanColourRuntime, colour_folder


@pytest.fixture(scope="module")
def wanted(reference: Path) -> dict[str, np.ndarray]:
    return {
        name: value.numpy() for name, value in load_file(reference / "linear_features/features.safetensors").items()
    }


@pytest.mark.parametrize("net", ["v1_vit", "v2_vit/noreg_mlp", "v2_vit/reg4_mlp"])
def test_cls_of_the_last_four_blocks_is_concatenated_oldest_first(net: str, reference: Path, wanted) -> None:
    backbone, io = load_reference(reference / net)
    version = "v1" if net == "v1_vit" else net.replace("_vit/", "_")
    with TorchRuntime(backbone, device="cpu") as runtime:
        made = features_of(runtime, io["native/image"].numpy(), ("embedding", "patch_mean", "cls_last4"))
    np.testing.assert_allclose(made["cls_last4"], wanted[f"{version}_n4_avgpool0"], atol=2e-5)
    np.testing.assert_allclose(made["embedding"], wanted[f"{version}_n1_avgpool0"], atol=2e-5)
    if version != "v1":
        joined = np.concatenate([made["cls_last4"], made["patch_mean"]], axis=1)
        np.testing.assert_allclose(joined, wanted[f"{version}_n4_avgpool1"], atol=2e-5)


def test_copy_detection_reads_cls_and_pooled_patches(reference: Path, wanted) -> None:
    backbone, io = load_reference(reference / "v1_vit")
    with TorchRuntime(backbone, device="cpu") as runtime:
        made = features_of(runtime, io["native/image"].numpy(), ("embedding", "patch_gem"))
    joined = np.concatenate([made["embedding"], made["patch_gem"]], axis=1)
    np.testing.assert_allclose(joined, wanted["v1_copy_detection"], atol=2e-5, rtol=1e-4)


def test_an_image_at_three_scales_has_the_official_feature(reference: Path, wanted) -> None:
    backbone, io = load_reference(reference / "v1_vit")
    with TorchRuntime(backbone, device="cpu") as runtime:
        made = features_of(runtime, io["native/image"].numpy()[:1], ("embedding",), (1.0, 2**-0.5, 0.5))
    np.testing.assert_allclose(made["embedding"], wanted["v1_multiscale_feature"], atol=2e-5)


def test_a_fitted_view_keeps_its_aspect_and_never_grows() -> None:
    pre = Preprocess(size_px=32, resize_px=32)
    assert fit_view(np.zeros((300, 600, 3), np.uint8), pre, 100).shape == (3, 50, 100)
    assert fit_view(np.zeros((30, 60, 3), np.uint8), pre, 100).shape == (3, 30, 60)


def test_images_of_several_shapes_share_a_batch_and_keep_their_order(tmp_path: Path) -> None:
    import cv2

    for i, (height, width) in enumerate([(40, 40), (20, 64), (40, 40), (64, 20), (20, 64)]):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((height, width, 3), 40 * i, np.uint8))
    spec = ExtractSpec(columns=("embedding",), view=ViewSpec(view="fit", size_px=64))
    runtime = MeanColourRuntime()
    runtime.manifest.architecture["patch_px"] = 4
    table = extract(runtime, open_dataset(tmp_path), spec)
    wanted = [(40 * i / 255 - SMALL.mean[0]) / SMALL.std[0] for i in range(5)]
    np.testing.assert_allclose(table.features[:, 0], wanted, atol=1e-5)
    with pytest.raises(InputError, match="patches is of another shape"):
        extract(_PatchCount(), open_dataset(tmp_path), ExtractSpec(columns=("patches",), view=spec.view))


class _PatchCount(MeanColourRuntime):
    """As many patches as the image has cells of 32 pixels."""

    def run(self, pixels_NCHW, outputs=("embedding",)):
        n, _, height, width = pixels_NCHW.shape
        return {name: np.zeros((n, height * width // 64, 3), np.float32) for name in outputs}

    def __init__(self) -> None:
        super().__init__()
        self.manifest.architecture["patch_px"] = 4


def test_more_decoding_threads_give_the_same_batches(tmp_path: Path) -> None:
    dataset = open_dataset(colour_folder(tmp_path))
    one, four = (list(decoded_batches(dataset, SMALL, ViewSpec(), 5, 3, workers)) for workers in (1, 4))
    assert [(batch.start, batch.stop) for batch in four] == [(batch.start, batch.stop) for batch in one]
    for a, b in zip(one, four, strict=True):
        np.testing.assert_array_equal(a.views, b.views)
    assert four[0].start == 3


def test_a_network_on_another_engine_goes_without_the_last_four_blocks(tmp_path: Path) -> None:
    table = extract(
        MeanColourRuntime(), open_dataset(colour_folder(tmp_path)), ExtractSpec(columns=("embedding", "cls_last4"))
    )
    assert list(table.columns) == ["embedding"]
