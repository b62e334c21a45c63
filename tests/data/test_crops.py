"""Multi-crop: sizes, where the parts come from, and how often each alteration happens, whoever makes the views."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data.crops import PLAN, CropSpec, crop_box, plan_views, shrink_boxes, shrink_factor, view_rng
from data.device_views import device_views
from data.errors import InputError
from data.views import carry_out, make_views
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
DRAWS = 700


def workers(images: list[np.ndarray], plans: list[np.ndarray], spec: CropSpec) -> list[np.ndarray]:
    """Views of each number, uint8 [B,h,w,3], as the workers make them."""
    made = [carry_out(image, plan, spec) for image, plan in zip(images, plans, strict=True)]
    return [np.stack([views[k] for views in made]) for k in range(spec.n_views)]


def device(images: list[np.ndarray], plans: list[np.ndarray], spec: CropSpec) -> list[np.ndarray]:
    """The same on a device."""
    views = device_views([torch.from_numpy(image) for image in images], np.stack(plans), spec, (0, 0, 0), (1, 1, 1))
    return [(view * 255).round().byte().permute(0, 2, 3, 1).numpy() for view in views]


Make = Callable[[list[np.ndarray], list[np.ndarray], CropSpec], list[np.ndarray]]
both_ways = pytest.mark.parametrize("make", [workers, device])


def views_of_square(make: Make, spec: CropSpec, n: int = DRAWS) -> list[np.ndarray]:
    return make([SQUARE] * n, [plan_views(16, 16, spec, view_rng(3, 0, index)) for index in range(n)], spec)


def share_altered(make: Make, spec: CropSpec) -> list[float]:
    """How often each view differs from the picture, over DRAWS pictures."""
    return [float((views != SQUARE).any(axis=(1, 2, 3)).mean()) for views in views_of_square(make, spec)]


def assert_probabilities(found: list[float], wanted: list[float]) -> None:
    for share, p in zip(found, wanted, strict=True):
        # five deviations of a binomial: one run in a million would miss it by chance, and the seed is fixed
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / DRAWS), (found, wanted)


@both_ways
def test_sizes_and_order_of_the_views(make: Make) -> None:
    spec = CropSpec(global_px=32, local_px=16, n_local=3)
    image = gradient(50, 70)
    views = make([image], [plan_views(50, 70, spec, view_rng(0, 0, 0))], spec)
    assert [view.shape for view in views] == [(1, 32, 32, 3)] * 2 + [(1, 16, 16, 3)] * 3
    assert {view.dtype for view in views} == {np.dtype(np.uint8)}
    assert spec.n_views == 5
    assert [spec.view_px(k) for k in range(5)] == [32, 32, 16, 16, 16]
    fewer = replace(spec, n_local=0)
    assert len(make([image], [plan_views(50, 70, fewer, view_rng(0, 0, 0))], fewer)) == 2


@both_ways
def test_nothing_is_altered_when_every_probability_is_zero(make: Make) -> None:
    assert share_altered(make, PLAIN) == [0.0] * 4


@both_ways
def test_mirroring_happens_half_of_the_time_and_mirrors(make: Make) -> None:
    assert_probabilities(share_altered(make, replace(PLAIN, flip=CropSpec().flip)), [0.5] * 4)
    (first, *_) = views_of_square(make, replace(PLAIN, flip=1.0), 1)
    np.testing.assert_array_equal(first[0], SQUARE[:, ::-1])


@both_ways
def test_colours_are_shaken_four_times_in_five(make: Make) -> None:
    assert_probabilities(share_altered(make, replace(PLAIN, jitter=CropSpec().jitter)), [0.8] * 4)


@both_ways
def test_colours_are_dropped_once_in_five_times(make: Make) -> None:
    assert_probabilities(share_altered(make, replace(PLAIN, gray=CropSpec().gray)), [0.2] * 4)
    (first, *_) = views_of_square(make, replace(PLAIN, gray=1.0), 1)
    luma = SQUARE @ np.array([0.299, 0.587, 0.114])
    assert np.abs(first[0] - luma[:, :, None]).max() <= 1


@both_ways
@pytest.mark.parametrize(
    ("blur_as", "wanted"), [("paper", [1.0, 0.1, 0.5, 0.5]), ("released", [0.0, 0.9, 0.5, 0.5])], ids=str
)
def test_blur_falls_on_each_view_as_often_as_printed_or_as_released(make: Make, blur_as: Any, wanted: list) -> None:
    """The released DINOv2 blurs with the opposite of the probability that it prints."""
    assert [CropSpec(blur_as=blur_as).blur_of(view) for view in range(4)] == pytest.approx(wanted)
    # from 0.4 px on a blur shows in eight bits; the default begins at 0.1
    spec = replace(PLAIN, blur=CropSpec().blur, blur_as=blur_as, blur_sigma_px=(0.4, 2.0))
    assert_probabilities(share_altered(make, spec), wanted)


@both_ways
def test_solarising_is_for_the_second_global_view_alone(make: Make) -> None:
    assert_probabilities(share_altered(make, replace(PLAIN, solarize=CropSpec().solarize)), [0.0, 0.2, 0.0, 0.0])
    (first, *_) = views_of_square(make, replace(PLAIN, solarize=(1.0, 0.0, 0.0)), 1)
    np.testing.assert_array_equal(first[0], np.where(SQUARE < 128, SQUARE, 255 - SQUARE))


def test_the_amounts_are_drawn_evenly_and_the_changes_in_every_order() -> None:
    spec = CropSpec(n_local=0)
    plans = np.stack([plan_views(40, 40, spec, view_rng(4, 0, i)) for i in range(DRAWS)])
    amounts = plans["amount"].reshape(-1, 4)
    for change, (low, high) in enumerate(((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))):
        assert_even(amounts[:, change], low, high)
    assert_even(plans["sigma_px"][:, 0], 0.1, 2.0)
    orders, counts = np.unique(plans["order"].reshape(-1, 4), axis=0, return_counts=True)
    assert len(orders) == 24
    assert np.abs(counts - 2 * DRAWS / 24).max() < 5 * math.sqrt(2 * DRAWS / 24)


def assert_even(values: np.ndarray, low: float, high: float) -> None:
    """Whether they fill a range evenly, ten bins of it within five deviations."""
    counts, _ = np.histogram(values, bins=10, range=(low - 1e-6, high + 1e-6))
    assert counts.sum() == len(values), (values.min(), values.max())
    assert np.abs(counts - len(values) / 10).max() < 5 * math.sqrt(len(values) * 0.09), counts


@both_ways
def test_the_four_changes_are_made_in_the_order_of_the_plan(make: Make) -> None:
    # brightness then contrast differs from contrast then brightness on a picture that is bright on one side
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, 8:] = 200
    plans = [plan_views(16, 16, replace(PLAIN, n_local=0), view_rng(0, 0, 0)) for _ in range(2)]
    for plan, order in zip(plans, ((0, 1, 2, 3), (1, 0, 2, 3)), strict=True):
        plan["jitter"], plan["order"], plan["amount"] = True, order, (1.3, 0.65, 1.0, 0.0)
    first, *_ = make([half, half], plans, replace(PLAIN, n_local=0))
    brighter = np.clip(half * 1.3, 0, 255)
    wanted = [brighter.mean() * 0.35 + brighter * 0.65, np.clip((half.mean() * 0.35 + half * 0.65) * 1.3, 0, 255)]
    for view, shades in zip(first, wanted, strict=True):
        assert np.abs(view - shades).max() <= 2


def test_the_defaults_are_the_published_ones() -> None:
    spec = CropSpec()
    assert (spec.global_px, spec.local_px, spec.n_local) == (224, 96, 8)
    assert (spec.global_scale, spec.local_scale, spec.ratio) == ((0.4, 1.0), (0.05, 0.4), (3 / 4, 4 / 3))
    assert (spec.flip, spec.jitter, spec.gray) == (0.5, 0.8, 0.2)
    assert (spec.brightness, spec.contrast, spec.saturation, spec.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (spec.blur, spec.blur_sigma_px, spec.solarize) == ((1.0, 0.1, 0.5), (0.1, 2.0), (0.0, 0.2, 0.0))
    assert (spec.blur_as, spec.blur_kernel) == ("paper", "boxes")


# --- where the parts come from ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4), (0.14, 0.14)], ids=str)
@pytest.mark.parametrize(("height", "width"), [(200, 300), (300, 200), (128, 128)])
def test_a_part_has_an_area_and_a_shape_within_the_ranges(height: int, width: int, scale: tuple[float, float]) -> None:
    ratio = CropSpec().ratio
    boxes = [crop_box(height, width, view_rng(1, 0, i).random((10, 4)).tolist(), scale, ratio) for i in range(400)]
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
    boxes = [
        crop_box(1000, 1000, view_rng(2, 0, i).random((10, 4)).tolist(), (0.05, 0.05), (1.0, 1.0)) for i in range(2000)
    ]
    _, _, tall, wide = boxes[0]
    for axis, room in ((0, 1000 - tall), (1, 1000 - wide)):
        places = np.array([box[axis] for box in boxes]) / room
        assert places.min() < 0.01
        assert places.max() > 0.99
        counts, _ = np.histogram(places, bins=10, range=(0, 1))
        assert np.abs(counts - 200).max() < 5 * math.sqrt(2000 * 0.1 * 0.9)


def test_the_corner_can_be_the_last_possible_one() -> None:
    draws = [[0.0, 0.5, 1 - 1e-16, 1 - 1e-16]]
    assert crop_box(10, 10, draws, (0.25, 0.25), (1.0, 1.0)) == (5, 5, 5, 5)
    assert crop_box(10, 10, draws, (1.0, 1.0), (1.0, 1.0)) == (0, 0, 10, 10)


@pytest.mark.parametrize(
    ("height", "width", "wanted"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (2, 500, (0, 248, 2, 3)), (1, 1, (0, 0, 1, 1))],
)
def test_where_no_part_fits_the_largest_centred_one_is_taken(
    height: int, width: int, wanted: tuple[int, int, int, int]
) -> None:
    assert crop_box(height, width, view_rng(0, 0, 0).random((10, 4)).tolist(), (0.9, 1.0), (3 / 4, 4 / 3)) == wanted


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 3000), (3000, 2), (3, 5)])
def test_images_of_extreme_shape_give_views(height: int, width: int) -> None:
    for index in range(20):
        views = make_views(noise(height, width), CropSpec(global_px=32, local_px=16), view_rng(0, 0, index))
        assert [view.shape[0] for view in views] == [32] * 2 + [16] * 8


@pytest.mark.parametrize(
    ("height", "width", "factor"), [(375, 500, 1), (1500, 2000, 2), (3000, 4000, 4), (9000, 9000, 8)]
)
def test_a_large_image_may_be_shrunk_until_the_smallest_part_has_just_the_pixels_of_its_view(
    height: int, width: int, factor: int
) -> None:
    spec = CropSpec(local_scale=(0.05, 0.05))
    plan = plan_views(height, width, spec, view_rng(0, 0, 0))
    assert shrink_factor(plan, spec) == factor
    spare = [min(step["box"][2:]) / spec.view_px(view) for view, step in enumerate(plan)]
    assert factor == 1 or factor <= min(spare)
    assert factor == 8 or min(spare) < 2 * factor


def test_parts_stay_where_they_are_when_the_image_is_shrunk() -> None:
    plan = np.zeros(3, PLAN)
    plan["box"] = [(0, 0, 401, 303), (397, 299, 4, 4), (100, 50, 200, 100)]
    shrink_boxes(plan, 4, 101, 76)
    assert plan["box"].tolist() == [[0, 0, 100, 76], [99, 75, 1, 1], [25, 12, 50, 25]]


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
        {"blur_kernel": "box"},
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_named(change: dict) -> None:
    (name,) = change
    with pytest.raises(InputError, match=rf"^crops\.{name} is "):
        CropSpec(**change)
