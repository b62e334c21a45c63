"""What each alteration does, beside Pillow, through which the published code makes its views; image by image and on a device."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data.crops import CropSpec, plan_views, shrink_factor, view_rng
from data.device_views import altered, device_views, resized, resized_by_products
from data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from data.views import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    carry_out,
    decode_and_plan,
    gaussian_blur,
    resize,
    to_batch,
)
from tests.data.pictures import encode, exif, gradient, noise, stored_as
from tests.oracles import pillow_views as pillow

Change = Callable[[np.ndarray, float], np.ndarray]


@pytest.fixture(scope="module")
def photographs(repo_root: Path) -> list[np.ndarray]:
    """Real images of different sizes."""
    paths = sorted((repo_root / "samples" / "images").glob("*.jpg"))[:16]
    assert len(paths) == 16
    return [np.array(Image.open(path).convert("RGB")) for path in paths]


def on_device(change: int) -> Change:
    """One of the four changes of colour as the device makes it."""

    def apply(image: np.ndarray, amount: float) -> np.ndarray:
        plan = plan_views(8, 8, CropSpec(n_local=0), view_rng(0, 0, 0))[:1]
        plan["jitter"], plan["gray"], plan["sigma_px"], plan["solarize"] = True, False, 0, False
        plan["amount"] = (1, 1, 1, 0)
        plan["amount"][0, change] = amount
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        return altered(pixels, plan, "boxes")[0].permute(1, 2, 0).numpy()

    return apply


# --- resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(375, 500, 224), (90, 70, 224), (101, 333, 96), (2, 3, 16), (1, 900, 32), (640, 8, 20)],
)
def test_both_ways_of_resizing_are_pillows_antialiased_bicubic(height: int, width: int, side: int) -> None:
    image = cv2.resize(noise(9 + height // 3, 9 + width // 3), (width, height), interpolation=cv2.INTER_LINEAR)
    wanted = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(resize(image, side) - wanted).max() <= 2
    plan = plan_views(height, width, CropSpec(flip=0.0), view_rng(0, 0, 0))[None, :1]
    plan["box"] = (0, 0, height, width)
    found = resized_by_products([torch.from_numpy(image)], plan, side)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - wanted).max() <= 2


def test_shrinking_does_not_alias() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize(stripes, 16)[:, 2:-2].astype(int) - 127.5).max() <= 2
    image = noise(16, 16)
    np.testing.assert_array_equal(resize(image, 16), image)


def test_images_of_many_sizes_are_resized_together_as_one_by_one() -> None:
    spec = CropSpec()
    images = [noise(40 + 37 * k, 300 - 29 * k, k) for k in range(8)]
    plans = np.stack([plan_views(*image.shape[:2], spec, view_rng(0, 0, k)) for k, image in enumerate(images)])
    tensors = [torch.from_numpy(image) for image in images]
    for part, side in ((plans[:, :2], 224), (plans[:, 2:], 96)):
        difference = (resized(tensors, part, side) - resized_by_products(tensors, part, side)).abs()
        # whole shades both, so that a half may be rounded to the other side, twice
        assert difference.max() <= 2
        assert difference.mean() < 0.1


# --- colours ----------------------------------------------------------------------------------------------------------

CHANGES = [
    pytest.param(adjust_brightness, on_device(0), pillow.brightness, (0.0, 0.6, 0.9, 1.0, 1.4), 1, id="brightness"),
    pytest.param(adjust_contrast, on_device(1), pillow.contrast, (0.0, 0.6, 0.9, 1.0, 1.4), 1, id="contrast"),
    pytest.param(adjust_saturation, on_device(2), pillow.saturation, (0.0, 0.8, 1.0, 1.2), 2, id="saturation"),
    # Pillow and OpenCV keep the hue in eight bits
    pytest.param(adjust_hue, on_device(3), pillow.hue, (-0.1, -0.03, 0.0, 0.05, 0.1), 12, id="hue"),
]


@pytest.mark.parametrize(("worker", "device", "wanted", "amounts", "shades"), CHANGES)
def test_a_change_of_colour_is_pillows(
    photographs: list[np.ndarray], worker: Change, device: Change, wanted: Callable, amounts: tuple, shades: int
) -> None:
    for image in photographs[:4]:
        for amount in amounts:
            right = np.asarray(wanted(Image.fromarray(image), amount)).astype(float)
            for change in (worker, device):
                difference = np.abs(change(image, amount) - right)
                assert difference.max() <= shades + 0.01, amount
                assert difference.mean() <= 1.5, amount


@pytest.mark.parametrize("change", [adjust_hue, on_device(3)])
def test_hue_turns_the_colour_circle(change: Change) -> None:
    red = np.zeros((2, 2, 3), np.uint8)
    red[:, :, 0] = 255
    for turn, channels in ((1 / 3, (0, 255, 0)), (-1 / 3, (0, 0, 255)), (0.5, (0, 255, 255)), (0.0, (255, 0, 0))):
        assert np.abs(change(red, turn).astype(int) - channels).max() <= 6
    gray = np.full((2, 2, 3), 77, np.uint8)
    np.testing.assert_array_equal(change(gray, 0.3), gray)


# --- blur -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["boxes", "nine"])
@pytest.mark.parametrize("sigma", [0.1, 0.35, 0.8, 1.4, 2.0])
def test_blur_is_pillows_of_that_radius_or_torchvisions_of_nine_pixels(
    photographs: list[np.ndarray], kernel: str, sigma: float
) -> None:
    spec = CropSpec(n_local=0, blur_kernel=kernel)  # type: ignore[arg-type]
    for image in (resize(photographs[0], 224), resize(photographs[1], 96)):
        right = np.asarray(pillow.blur(Image.fromarray(image), sigma, kernel)).astype(float)
        plan = plan_views(8, 8, spec, view_rng(0, 0, 0))[:1]
        plan["jitter"], plan["gray"], plan["sigma_px"], plan["solarize"] = False, False, sigma, False
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
        for found in (
            gaussian_blur(image, sigma, spec.blur_kernel),
            altered(pixels, plan, spec.blur_kernel)[0].permute(1, 2, 0).numpy(),
        ):
            # Pillow rounds after each of its six passes
            assert np.abs(found - right).max() <= (4 if kernel == "boxes" else 1)
            assert np.abs(found - right).mean() <= 0.8


# --- whole views ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [CropSpec(), CropSpec(blur_as="released", blur_kernel="nine")], ids=["v1", "v2"])
def test_views_are_those_of_the_published_code_within_roundings(photographs: list[np.ndarray], spec: CropSpec) -> None:
    """On average a shade for each of the changes that end in whole ones; a worker's and a device's differ by half of that."""
    means = []
    for k, image in enumerate(photographs):
        plan = plan_views(*image.shape[:2], spec, view_rng(0, 0, k))
        workers = carry_out(image, plan, spec)
        device = device_views([torch.from_numpy(image)], plan[None], spec, (0, 0, 0), (1, 1, 1))
        for view, step in enumerate(plan):
            right = np.asarray(pillow.pillow_view(Image.fromarray(image), step, spec.view_px(view), spec.blur_kernel))
            on_device = device[view][0].permute(1, 2, 0).numpy() * 255
            pairs = ((workers[view], right), (on_device, right), (workers[view], on_device))
            differences = [np.abs(one.astype(float) - other) for one, other in pairs]
            assert [difference.mean() <= 5 for difference in differences] == [True] * 3, (k, view, step)
            assert [difference.max() <= 30 for difference in differences] == [True] * 3, (k, view, step)
            means.append([difference.mean() for difference in differences])
    assert (np.mean(means, axis=0) <= [1.0, 1.3, 0.7]).all()


def test_a_batch_on_a_device_holds_the_views_of_each_image_alone(photographs: list[np.ndarray]) -> None:
    spec = CropSpec(global_px=48, local_px=24, n_local=3)
    plans = np.stack([plan_views(*image.shape[:2], spec, view_rng(1, 0, k)) for k, image in enumerate(photographs)])
    tensors = [torch.from_numpy(image) for image in photographs]
    together = device_views(tensors, plans, spec)
    for k in range(len(tensors)):
        alone = device_views(tensors[k : k + 1], plans[k : k + 1], spec)
        for view, one in zip(together, alone, strict=True):
            torch.testing.assert_close(view[k : k + 1], one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_and_gives_nearly_the_same_views(orientation: int) -> None:
    image = cv2.GaussianBlur(cv2.resize(noise(120, 160), (1600, 1200), interpolation=cv2.INTER_CUBIC), (0, 0), 2)
    data = encode(stored_as(image, orientation), "JPEG", quality=95, exif=exif(orientation))
    spec = CropSpec(global_px=96, local_px=48, n_local=2, local_scale=(0.2, 0.4))
    small, plan = decode_and_plan(data, spec, view_rng(0, 0, 5))
    whole, whole_plan = image, plan_views(1200, 1600, spec, view_rng(0, 0, 5))
    factor = shrink_factor(whole_plan, spec)
    assert factor > 1
    assert small.shape == (1200 // factor, 1600 // factor, 3)
    for name in ("flip", "amount", "sigma_px"):
        np.testing.assert_array_equal(plan[name], whole_plan[name])
    # parts begin and end on pixels of the smaller image
    assert np.abs(plan["box"] * factor - whole_plan["box"]).max() <= factor / 2
    whole_plan["box"] = plan["box"] * factor
    for found, wanted in zip(carry_out(small, plan, spec), carry_out(whole, whole_plan, spec), strict=True):
        assert np.abs(found.astype(float) - wanted).mean() < 4
    png, png_plan = decode_and_plan(encode(image, "PNG"), spec, view_rng(0, 0, 5))
    assert png.shape == small.shape
    np.testing.assert_array_equal(png_plan, plan)


def test_an_image_that_no_view_shrinks_is_decoded_whole() -> None:
    image, plan = decode_and_plan(encode(gradient(300, 400), "JPEG"), CropSpec(), view_rng(0, 0, 0))
    assert image.shape == (300, 400, 3)
    np.testing.assert_array_equal(plan, plan_views(300, 400, CropSpec(), view_rng(0, 0, 0)))


def test_a_batch_is_normalised_channels_first() -> None:
    views = [noise(9, 9, seed) for seed in range(3)]
    wanted = (np.stack(views) / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
    for given in (views, torch.from_numpy(np.stack(views))):
        batch = to_batch(given)
        assert batch.dtype == torch.float32
        assert batch.is_contiguous()
        np.testing.assert_allclose(batch.numpy(), wanted.transpose(0, 3, 1, 2), atol=2e-6)
