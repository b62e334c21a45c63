"""Model FLOPs of a step against published figures and torch's counter; the peaks they are divided by."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.loop import Plan
from training.methods import make_state, take_step_
from training.published import PUBLISHED
from training.recipes import RECIPES
from training.speed import MEASURED, Speed, peak_flops, peak_memory_gb, step_flops, view_flops


@pytest.mark.parametrize(
    ("name", "tflop"),
    [("dino_vits16", 0.114), ("dinov2_vitl16_short", 1.16), ("dinov2_vitl14", 1.39), ("dinov2_vitg14", 5.03)],
)
def test_flops_an_image_are_those_of_the_literature(name: str, tflop: float) -> None:
    recipe = PUBLISHED[name]
    assert step_flops(recipe, as_published=True) / recipe.batch_size / 1e12 == pytest.approx(tflop, rel=0.015)


@pytest.mark.parametrize(("name", "gflop"), [("dino_vits16", 9.2), ("dino_resnet50", 8.2)])
def test_flops_of_a_view_of_224_pixels(name: str, gflop: float) -> None:
    """ViT-S/16: 4.6 GMAC, ResNet-50: 4.1 GMAC."""
    assert view_flops(PUBLISHED[name].backbone, 224) / 1e9 == pytest.approx(gflop, rel=0.01)


@pytest.mark.parametrize("name", ["smoke", "smoke_dinov2"])
def test_flops_of_a_step_agree_with_what_torch_counts(name: str) -> None:
    """Oracle: torch's counter over a real step, attention as plain products so that it sees them.

    It does not see that the first layer needs no gradient of its input here and counts what the masks of this step hold.
    """
    recipe = replace(RECIPES[name], backbone=replace(RECIPES[name].backbone, drop_path=0.0))
    state, crops = make_state(recipe, torch.device("cpu")), recipe.crops
    views = [torch.randn(8, 3, crops.view_px(i), crops.view_px(i)) for i in range(crops.n_views)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        take_step_(state, views, Plan(recipe, 4).at(3), recipe, np.random.default_rng(0))
    assert step_flops(recipe) == pytest.approx(counter.get_total_flops(), rel=0.08)


@pytest.mark.parametrize(
    ("name", "dtype", "tflop"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.float16, 756),
        ("NVIDIA H200", torch.bfloat16, 989),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 19.5),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L40", torch.bfloat16, 181),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA A10G", torch.bfloat16, 70),
    ],
)
def test_the_peak_of_a_known_gpu_is_its_data_sheets(
    name: str, dtype: torch.dtype, tflop: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), dtype)[0] == tflop * 1e12


def test_the_peak_of_a_cpu_is_measured() -> None:
    rate, source = peak_flops(torch.device("cpu"), torch.float32)
    assert rate > 1e8
    assert source == "measured product"


def test_mfu_is_model_flops_over_time_and_peak() -> None:
    speed = Speed(torch.device("cpu"), batch_size=8, flops=6e9, peak=100e9, peak_from="test")
    found = speed.of_step(took_s=0.5, waited_s=0.1)
    assert found["images_per_s"] == 16
    assert found["data_wait"] == pytest.approx(0.2)
    assert found["mfu"] == pytest.approx(0.12)
    assert found["peak_memory_gb"] == pytest.approx(peak_memory_gb(torch.device("cpu")), rel=0.2)
    assert found["peak_memory_gb"] > 0.1


def test_a_step_faster_than_the_measured_product_is_the_new_peak() -> None:
    # The product was measured while the machine was busy; at that rate the steps after it would be at 192 %.
    speed = Speed(torch.device("cpu"), batch_size=8, flops=6e9, peak=1e9, peak_from=MEASURED)
    assert speed.of_step(took_s=1.0, waited_s=0.0)["mfu"] == pytest.approx(1.0)
    assert speed.of_step(took_s=2.0, waited_s=0.0)["mfu"] == pytest.approx(0.5)
    assert Speed(torch.device("cpu"), 8, 6e9, 1e9, "data sheet of X").of_step(1.0, 0.0)["mfu"] == pytest.approx(6.0)
