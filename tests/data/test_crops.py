"""Multi-crop: sizes, where the parts come from, how often each alteration happens and what it does."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.crops import (
    CropSpec,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    crop_box,
    gaussian_blur,
    make_views,
    resize,
    to_batch,
    view_rng,
)
from data.errors import InputError
from data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from tests.data.pictures import gradient, noise

PLAIN = CropSpec(
    global_px=16,
    local_px=16,
    n_local=2,
    global_scale=(1.0, 1.0),
    local_scale=(1.0, 1.0),
    ratio=(1.0, 1.0),
    flip=0.0,
    jitter=0.0,
    gray=0.0,
    blur=(0.0, 0.0, 0.0),
    solarize=(0.0, 0.0, 0.0),
)
"""Takes the whole of a 16-pixel square and alters nothing."""
SQUARE = noise(16, 16)
DRAWS = 1500


def share_altered(spec: CropSpec) -> list[float]:
    """How often each view differs from the picture, over DRAWS pictures."""
    altered = np.zeros(spec.n_views)
    for index in range(DRAWS):
        views = make_views(SQUARE, spec, view_rng(3, 0, index))
        altered += [not np.array_equal(view, SQUARE) for view in views]
    return (altered / DRAWS).tolist()


def assert_probabilities(found: list[float], wanted: list[float]) -> None:
    for share, p in zip(found, wanted, strict=True):
        # five deviations of a binomial: one run in a million would miss it by chance, and the seed is fixed
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / DRAWS), (found, wanted)


def test_sizes_and_order_of_the_views() -> None:
    spec = CropSpec(global_px=32, local_px=16, n_local=3)
    views = make_views(gradient(50, 70), spec, view_rng(0, 0, 0))
    assert [view.shape for view in views] == [(32, 32, 3)] * 2 + [(16, 16, 3)] * 3
    assert {view.dtype for view in views} == {np.dtype(np.uint8)}
    assert spec.n_views == 5
    assert [spec.view_px(k) for k in range(5)] == [32, 32, 16, 16, 16]
    assert len(make_views(gradient(50, 70), replace(spec, n_local=0), view_rng(0, 0, 0))) == 2


def test_nothing_is_altered_when_every_probability_is_zero() -> None:
    assert share_altered(PLAIN) == [0.0] * 4


def test_mirroring_happens_half_of_the_time_and_mirrors() -> None:
    assert_probabilities(share_altered(replace(PLAIN, flip=CropSpec().flip)), [0.5] * 4)
    (first, *_) = make_views(SQUARE, replace(PLAIN, flip=1.0), view_rng(0, 0, 0))
    np.testing.assert_array_equal(first, SQUARE[:, ::-1])


def test_colours_are_shaken_four_times_in_five() -> None:
    assert_probabilities(share_altered(replace(PLAIN, jitter=CropSpec().jitter)), [0.8] * 4)


def test_colours_are_dropped_once_in_five_times() -> None:
    assert_probabilities(share_altered(replace(PLAIN, gray=CropSpec().gray)), [0.2] * 4)
    (first, *_) = make_views(SQUARE, replace(PLAIN, gray=1.0), view_rng(0, 0, 0))
    luma = SQUARE @ np.array([0.299, 0.587, 0.114])
    assert np.abs(first - luma[:, :, None]).max() <= 1


def test_the_released_dinov2_blurs_with_the_opposite_probability() -> None:
    spec = CropSpec(blur_as="released")
    assert [spec.blur_of(view) for view in range(4)] == pytest.approx([0.0, 0.9, 0.5, 0.5])
    blurred = replace(PLAIN, blur=(0.0, 1.0, 1.0), blur_as="released", blur_sigma_px=(1.0, 2.0))
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    for view, (plain, found) in enumerate(
        zip(make_views(image, PLAIN, view_rng(0, 0, 0)), make_views(image, blurred, view_rng(0, 0, 0)), strict=True)
    ):
        assert np.array_equal(plain, found) == (view > 0)


def test_blur_is_for_the_first_global_view_rarely_the_second_and_half_of_the_local_ones() -> None:
    # from 0.4 px on a blur shows in eight bits; the default begins at 0.1
    spec = replace(PLAIN, blur=CropSpec().blur, blur_sigma_px=(0.4, 2.0))
    assert_probabilities(share_altered(spec), [1.0, 0.1, 0.5, 0.5])


def test_solarising_is_for_the_second_global_view_alone() -> None:
    assert_probabilities(share_altered(replace(PLAIN, solarize=CropSpec().solarize)), [0.0, 0.2, 0.0, 0.0])
    (first, *_) = make_views(SQUARE, replace(PLAIN, solarize=(1.0, 0.0, 0.0)), view_rng(0, 0, 0))
    np.testing.assert_array_equal(first, np.where(SQUARE < 128, SQUARE, 255 - SQUARE))


def test_the_defaults_are_the_published_ones() -> None:
    spec = CropSpec()
    assert (spec.global_px, spec.local_px, spec.n_local) == (224, 96, 8)
    assert (spec.global_scale, spec.local_scale, spec.ratio) == ((0.4, 1.0), (0.05, 0.4), (3 / 4, 4 / 3))
    assert (spec.flip, spec.jitter, spec.gray) == (0.5, 0.8, 0.2)
    assert (spec.brightness, spec.contrast, spec.saturation, spec.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (spec.blur, spec.blur_sigma_px, spec.solarize) == ((1.0, 0.1, 0.5), (0.1, 2.0), (0.0, 0.2, 0.0))


# --- where the parts come from ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4), (0.14, 0.14)], ids=str)
@pytest.mark.parametrize(("height", "width"), [(200, 300), (300, 200), (128, 128)])
def test_a_part_has_an_area_and_a_shape_within_the_ranges(height: int, width: int, scale: tuple[float, float]) -> None:
    ratio = CropSpec().ratio
    boxes = [crop_box(height, width, scale, ratio, view_rng(1, 0, i).random((10, 4))) for i in range(400)]
    shares = np.array([tall * wide / (height * width) for _, _, tall, wide in boxes])
    shapes = np.array([wide / tall for _, _, tall, wide in boxes])
    for top, left, tall, wide in boxes:
        assert 0 <= top <= height - tall
        assert 0 <= left <= width - wide
    rounding = 2 / min(min(tall, wide) for _, _, tall, wide in boxes)
    assert shares.min() >= scale[0] * (1 - rounding)
    assert shares.max() <= scale[1] * (1 + rounding)
    assert shapes.min() >= ratio[0] * (1 - rounding)
    assert shapes.max() <= ratio[1] * (1 + rounding)
    # both ends of the ranges are reached; a part that all but fills a wide image must itself be wide, so not all shares
    assert shares.min() < scale[0] + 0.1 * (scale[1] - scale[0]) + 0.01
    assert np.log(shapes).std() > 0.1


def test_parts_of_a_large_image_are_spread_evenly() -> None:
    boxes = [crop_box(1000, 1000, (0.05, 0.05), (1.0, 1.0), view_rng(2, 0, i).random((10, 4))) for i in range(2000)]
    _, _, tall, wide = boxes[0]
    for axis, room in ((0, 1000 - tall), (1, 1000 - wide)):
        places = np.array([box[axis] for box in boxes]) / room
        assert places.min() < 0.01
        assert places.max() > 0.99
        counts, _ = np.histogram(places, bins=10, range=(0, 1))
        assert np.abs(counts - 200).max() < 5 * math.sqrt(2000 * 0.1 * 0.9)


def test_the_corner_can_be_the_last_possible_one() -> None:
    draws = np.array([[0.0, 0.5, 1 - 1e-16, 1 - 1e-16]])
    assert crop_box(10, 10, (0.25, 0.25), (1.0, 1.0), draws) == (5, 5, 5, 5)
    assert crop_box(10, 10, (1.0, 1.0), (1.0, 1.0), draws) == (0, 0, 10, 10)


@pytest.mark.parametrize(
    ("height", "width", "wanted"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (2, 500, (0, 248, 2, 3)), (1, 1, (0, 0, 1, 1))],
)
def test_where_no_part_fits_the_largest_centred_one_is_taken(
    height: int, width: int, wanted: tuple[int, int, int, int]
) -> None:
    assert crop_box(height, width, (0.9, 1.0), (3 / 4, 4 / 3), view_rng(0, 0, 0).random((10, 4))) == wanted


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 3000), (3000, 2), (3, 5)])
def test_images_of_extreme_shape_give_views(height: int, width: int) -> None:
    for index in range(20):
        views = make_views(noise(height, width), CropSpec(global_px=32, local_px=16), view_rng(0, 0, index))
        assert [view.shape[0] for view in views] == [32] * 2 + [16] * 8


def test_resizing_to_less_than_half_averages_and_does_not_alias() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resize(stripes, 16)
    assert np.abs(small.astype(int) - 127.5).max() <= 1
    np.testing.assert_array_equal(resize(SQUARE, 16), SQUARE)


# --- randomness -------------------------------------------------------------------------------------------------------


def test_views_follow_from_seed_epoch_and_index_alone() -> None:
    spec, image = CropSpec(global_px=24, local_px=16, n_local=2), noise(40, 40)

    def views(seed: int, epoch: int, index: int) -> bytes:
        return b"".join(view.tobytes() for view in make_views(image, spec, view_rng(seed, epoch, index)))

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (2**40, 0, 0), (0, 2**33, 7)]
    assert len({views(*place) for place in places}) == len(places)
    assert [views(*place) for place in places] == [views(*place) for place in places]


def test_a_view_does_not_depend_on_the_settings_of_the_views_before_it() -> None:
    spec, image = CropSpec(global_px=24, local_px=16, n_local=3), noise(40, 40)
    views = make_views(image, spec, view_rng(5, 0, 0))
    fewer = make_views(image, replace(spec, n_local=1), view_rng(5, 0, 0))
    for view, wanted in zip(fewer, views, strict=False):
        np.testing.assert_array_equal(view, wanted)
    blur = make_views(image, replace(spec, blur=(0.0, 0.1, 0.5), solarize=(1.0, 0.2, 0.0)), view_rng(5, 0, 0))
    assert not np.array_equal(blur[0], views[0])
    for view, wanted in zip(blur[1:], views[1:], strict=True):
        np.testing.assert_array_equal(view, wanted)


def test_the_image_itself_is_never_altered() -> None:
    image = SQUARE.copy()
    everything = replace(PLAIN, flip=1.0, jitter=1.0, gray=1.0, blur=(1.0,) * 3, solarize=(1.0,) * 3)
    make_views(image, everything, view_rng(0, 0, 0))
    np.testing.assert_array_equal(image, SQUARE)


# --- the alterations --------------------------------------------------------------------------------------------------


def test_brightness_blends_with_black() -> None:
    for factor in (0.0, 0.6, 1.0, 1.4):
        wanted = np.clip(SQUARE * factor, 0, 255)
        assert np.abs(adjust_brightness(SQUARE, factor) - wanted).max() <= 1


def test_contrast_blends_with_the_mean_shade_of_gray() -> None:
    mean = (SQUARE @ np.array([0.299, 0.587, 0.114])).mean()
    for factor in (0.0, 0.6, 1.0, 1.4):
        wanted = np.clip(SQUARE * factor + mean * (1 - factor), 0, 255)
        assert np.abs(adjust_contrast(SQUARE, factor) - wanted).max() <= 1.5


def test_saturation_blends_with_gray() -> None:
    gray = (SQUARE @ np.array([0.299, 0.587, 0.114]))[:, :, None]
    for factor in (0.0, 0.8, 1.0, 1.2):
        wanted = np.clip(SQUARE * factor + gray * (1 - factor), 0, 255)
        assert np.abs(adjust_saturation(SQUARE, factor) - wanted).max() <= 1.5


def test_hue_turns_the_colour_circle() -> None:
    red = np.zeros((2, 2, 3), np.uint8)
    red[:, :, 0] = 255
    for turn, channels in ((1 / 3, (0, 255, 0)), (-1 / 3, (0, 0, 255)), (0.5, (0, 255, 255)), (0.0, (255, 0, 0))):
        assert np.abs(adjust_hue(red, turn).astype(int) - channels).max() <= 6
    gray = np.full((2, 2, 3), 77, np.uint8)
    np.testing.assert_array_equal(adjust_hue(gray, 0.3), gray)


def test_the_amounts_lie_evenly_within_their_half_widths() -> None:
    gray = np.full((16, 16, 3), 100, np.uint8)
    spec = replace(PLAIN, jitter=1.0, contrast=0.0, saturation=0.0, hue=0.0)
    factors = np.array([make_views(gray, spec, view_rng(4, 0, i))[0].mean() / 100 for i in range(1000)])
    assert 0.595 <= factors.min() < 0.62
    assert 1.38 < factors.max() <= 1.405
    assert abs(factors.mean() - 1) < 5 * 0.8 / math.sqrt(12 * 1000)


def test_the_four_changes_come_in_random_order() -> None:
    # brightness then contrast differs from contrast then brightness on a picture that is bright on one side
    spec = replace(PLAIN, jitter=1.0, n_local=0)
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, 8:] = 200
    draws = view_rng(0, 0, 0).random((1, 54))
    seen = set()
    for order in ((0.1, 0.2, 0.3, 0.4), (0.2, 0.1, 0.3, 0.4)):

        class Fixed:
            def random(self, shape: tuple[int, int], order: tuple[float, ...] = order) -> np.ndarray:
                rows = np.repeat(draws, shape[0], axis=0)
                rows[:, 6:10] = (0.9, 0.1, 0.5, 0.5)
                rows[:, 10:14] = order
                return rows

        seen.add(make_views(half, spec, Fixed())[0].tobytes())  # type: ignore[arg-type]
    assert len(seen) == 2


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_a_gaussian(sigma: float) -> None:
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(SQUARE.astype(float), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    rows = np.stack(
        [np.convolve(column, kernel, "valid") for column in padded.transpose(1, 2, 0).reshape(-1, 16 + 2 * reach)]
    )
    tall = rows.reshape(16 + 2 * reach, 3, 16).transpose(2, 0, 1)
    lines = np.stack(
        [np.convolve(line, kernel, "valid") for line in tall.transpose(0, 2, 1).reshape(-1, 16 + 2 * reach)]
    )
    wanted = lines.reshape(16, 3, 16).transpose(0, 2, 1)
    assert np.abs(gaussian_blur(SQUARE, sigma) - wanted).max() <= 2


def test_a_batch_is_normalised_channels_first() -> None:
    views = [noise(9, 9, seed) for seed in range(3)]
    wanted = (np.stack(views) / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
    for given in (views, torch.from_numpy(np.stack(views))):
        batch = to_batch(given)
        assert batch.dtype == torch.float32
        assert batch.is_contiguous()
        np.testing.assert_allclose(batch.numpy(), wanted.transpose(0, 3, 1, 2), atol=2e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"global_px": 7},
        {"local_px": 0},
        {"n_local": -1},
        {"global_scale": (0.0, 1.0)},
        {"local_scale": (0.4, 0.05)},
        {"global_scale": (0.5, 1.5)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"blur_sigma_px": (0.0, 1.0)},
        {"flip": 1.1},
        {"jitter": -0.1},
        {"gray": float("nan")},
        {"blur": (1.0, 0.1, 2.0)},
        {"solarize": (0.0, -0.2, 0.0)},
        {"brightness": 1.5},
        {"hue": 0.6},
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_named(change: dict) -> None:
    (name,) = change
    with pytest.raises(InputError, match=rf"^crops\.{name} is "):
        CropSpec(**change)
