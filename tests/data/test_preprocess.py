"""Preprocess: what is stored comes back, and the two views are Pillow's resize and a crop, to the last bit that counts."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from data.errors import InputError
from data.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_VIEW_PX,
    Preprocess,
    center_view,
    check_view_px,
    normalise,
    whole_view,
)
from tests.data.pictures import gradient, noise

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
ODD = Preprocess(
    size_px=40, resize_px=48, whole_px=56, mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7), interpolation="bilinear"
)


def normalised(image_HWC: np.ndarray, pre: Preprocess) -> np.ndarray:
    """The formula, in double precision."""
    return ((image_HWC / 255.0 - np.array(pre.mean)) / np.array(pre.std)).transpose(2, 0, 1)


def center_oracle(image: np.ndarray, pre: Preprocess) -> np.ndarray:
    """Resize the whole image, then cut: the usual evaluation transform in its own two steps."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = (int(pre.resize_px * width / short), int(pre.resize_px * height / short))
    resized = np.asarray(Image.fromarray(image).resize(size, FILTERS[pre.interpolation]))
    top, left = (round((side - pre.size_px) / 2.0) for side in resized.shape[:2])
    return resized[top : top + pre.size_px, left : left + pre.size_px]


@pytest.mark.parametrize("pre", [Preprocess(), ODD], ids=["default", "odd"])
def test_json_gives_back_the_same(pre: Preprocess) -> None:
    text = json.dumps(pre.to_json())
    assert Preprocess.from_json(json.loads(text)) == pre
    assert set(pre.to_json()) == {field.name for field in dataclasses.fields(Preprocess)}


def test_the_statistics_are_imagenets() -> None:
    assert Preprocess().mean == IMAGENET_MEAN == (0.485, 0.456, 0.406)
    assert Preprocess().std == IMAGENET_STD == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size_px": 0}, "preprocess.size_px is 0"),
        ({"size_px": MAX_VIEW_PX + 1, "resize_px": MAX_VIEW_PX + 1}, "preprocess.size_px is 4097"),
        ({"size_px": 224.0}, "preprocess.size_px is 224.0"),
        ({"size_px": True}, "preprocess.size_px is True"),
        ({"size_px": "224"}, "preprocess.size_px is '224'"),
        ({"resize_px": 100}, "preprocess.resize_px is 100, smaller than size_px 224"),
        ({"whole_px": -1}, "preprocess.whole_px is -1"),
        ({"mean": [0.5, 0.5]}, "preprocess.mean"),
        ({"mean": 0.5}, "preprocess.mean"),
        ({"mean": [0.5, 0.5, float("nan")]}, "preprocess.mean"),
        ({"mean": [127.5, 127.5, 127.5]}, "preprocess.mean"),
        ({"std": [0.2, 0.0, 0.2]}, "preprocess.std"),
        ({"std": [0.2, None, 0.2]}, "preprocess.std"),
        ({"interpolation": "nearest"}, "preprocess.interpolation is 'nearest'"),
        ({"interpolation": ["bicubic"]}, "preprocess.interpolation"),
        ({"gamma": 2.2}, "unknown gamma"),
    ],
    ids=str,
)
def test_a_value_that_makes_no_sense_is_named(change: dict, named: str) -> None:
    with pytest.raises(InputError, match=named.replace(".", r"\.")):
        Preprocess.from_json({**Preprocess().to_json(), **change})


def test_a_missing_field_is_named() -> None:
    values = Preprocess().to_json()
    del values["std"]
    with pytest.raises(InputError, match="lacks std"):
        Preprocess.from_json(values)
    with pytest.raises(InputError, match="preprocess is a list"):
        Preprocess.from_json([1, 2])  # type: ignore[arg-type]


def test_normalising_is_the_formula_for_every_shade() -> None:
    shades = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    for pre in (Preprocess(), ODD):
        found = normalise(shades, pre)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, normalised(shades, pre), atol=1e-6)


@pytest.mark.parametrize("pre", [Preprocess(), ODD], ids=["default", "odd"])
@pytest.mark.parametrize(
    ("height", "width"), [(300, 400), (401, 299), (100, 100), (64, 300), (31, 47), (256, 256), (2, 9), (500, 500)]
)
def test_the_centre_view_is_resize_and_cut(height: int, width: int, pre: Preprocess) -> None:
    image = gradient(height, width)
    found = center_view(image, pre)
    assert found.shape == (3, pre.size_px, pre.size_px)
    wanted = center_oracle(image, pre)
    # The part that is kept is resized alone, from a box in floating point; halves, of which a gradient has many, may
    # then be rounded to the next shade.
    shade = 1 / 255 / np.array(pre.std)[:, None, None]
    assert (np.abs(found - normalised(wanted, pre)) / shade).max() < 1.01


@pytest.mark.parametrize("pre", [Preprocess(), ODD], ids=["default", "odd"])
def test_the_centre_view_of_noise_has_no_shift(pre: Preprocess) -> None:
    # noise shows a shift of a fraction of a pixel, which a smooth picture hides
    for height, width in ((300, 411), (190, 97)):
        image = noise(height, width)
        difference = np.abs(center_view(image, pre) - normalised(center_oracle(image, pre), pre))
        shade = 1 / 255 / np.array(pre.std)[:, None, None]
        assert (difference / shade).max() < 2.01
        assert (difference / shade > 0.01).mean() < 0.02


@pytest.mark.parametrize("pre", [Preprocess(), ODD], ids=["default", "odd"])
@pytest.mark.parametrize(("height", "width"), [(300, 400), (64, 300), (2, 9), (56, 56)])
def test_the_whole_view_is_pillows_resize(height: int, width: int, pre: Preprocess) -> None:
    image = noise(height, width)
    for side in (None, 32, 56, 500):
        size = side or pre.whole_px
        wanted = np.asarray(Image.fromarray(image).resize((size, size), FILTERS[pre.interpolation]))
        np.testing.assert_allclose(whole_view(image, pre, side), normalised(wanted, pre), atol=1e-6)


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = noise(256, 256)
    np.testing.assert_array_equal(center_view(image, Preprocess()), normalise(image[16:240, 16:240], Preprocess()))
    square = noise(224, 224)
    np.testing.assert_array_equal(whole_view(square, Preprocess()), normalise(square, Preprocess()))


def test_a_strip_of_a_million_columns_is_cheap() -> None:
    strip = np.zeros((2, 1_000_000, 3), np.uint8)
    strip[:, 499_990:500_010] = 200
    view = center_view(strip, Preprocess())
    assert view.shape == (3, 224, 224)
    assert view[0].max() > view[0].min() or (view[0] > 0).all()


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)],
    ids=["gray", "alpha", "float"],
)
def test_only_decoded_images_make_views(image: np.ndarray) -> None:
    for view in (center_view, whole_view):
        with pytest.raises(InputError, match=r"a view is made of uint8 \[H,W,3\], not "):
            view(image, Preprocess())


@pytest.mark.parametrize("value", [0, -5, 4097, 3.5, True, "224", None])
def test_a_size_asked_for_is_a_whole_number_of_pixels(value: object) -> None:
    with pytest.raises(InputError, match="wanted a whole number of pixels from 1 to 4096"):
        check_view_px(value)
