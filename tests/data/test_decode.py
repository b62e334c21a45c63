"""The decoder: which files become which pixels, and which reason is given for the others."""

import io
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile

from data.decode import DecodeError, DecodeLimits, decode_image, turn_upright
from tests.data.pictures import encode, exif, gradient, noise, stored_as

UPRIGHT = gradient()


def reason_for(data: bytes, **limits: int) -> str:
    """The reason of the refusal; its message must be one line of use to people."""
    with pytest.raises(DecodeError) as caught:
        decode_image(data, DecodeLimits(**limits))
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: Pillow cannot write 16-bit colour. `rows` hold a filter byte each."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(form: str) -> None:
    found = decode_image(encode(UPRIGHT, form))
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert found.flags.writeable
    np.testing.assert_array_equal(found, UPRIGHT)


def test_lossless_webp_comes_back_exactly() -> None:
    np.testing.assert_array_equal(decode_image(encode(UPRIGHT, "WEBP", lossless=True)), UPRIGHT)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "group4"])
def test_compressed_tiff_comes_back_exactly(compression: str) -> None:
    picture = Image.fromarray(UPRIGHT)
    if compression == "group4":
        picture = picture.convert("1")
    found = decode_image(encode(picture, "TIFF", compression=compression))
    np.testing.assert_array_equal(found, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"subsampling": 0}], ids=str)
def test_jpeg_is_the_picture_but_for_its_compression(options: dict) -> None:
    data = encode(UPRIGHT, "JPEG", quality=95, **options)
    found = decode_image(data)
    oracle = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    # two decoders of one standard may round, and spread chroma, differently
    assert np.abs(found.astype(int) - oracle).mean() < 1.5
    assert np.abs(found.astype(int) - UPRIGHT).mean() < 6


def test_lossy_webp_is_what_pillow_says() -> None:
    data = encode(UPRIGHT, "WEBP", quality=80)
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_gray_becomes_rgb_of_equal_channels(form: str) -> None:
    gray = Image.fromarray(UPRIGHT).convert("L")
    found = decode_image(encode(gray, form, **({"lossless": True} if form == "WEBP" else {})))
    assert found.shape == UPRIGHT.shape
    assert (found == found[:, :, :1]).all()
    assert np.abs(found[:, :, 0].astype(int) - np.asarray(gray)).max() <= (8 if form == "JPEG" else 0)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_transparency_lies_over_white(form: str) -> None:
    rgba = np.dstack([UPRIGHT, np.full(UPRIGHT.shape[:2], 255, np.uint8)])
    rgba[:8, :, 3], rgba[8:16, :, 3] = 0, 128
    found = decode_image(encode(rgba, form, **({"lossless": True, "exact": True} if form == "WEBP" else {})))
    alpha = rgba[:, :, 3:] / 255
    np.testing.assert_allclose(found, UPRIGHT * alpha + 255 * (1 - alpha), atol=1)
    assert (found[:8] == 255).all()
    np.testing.assert_array_equal(found[16:], UPRIGHT[16:])


def test_gray_with_alpha_lies_over_white() -> None:
    picture = np.array([[[0, 0], [0, 255]], [[100, 128], [200, 255]]], np.uint8)
    found = decode_image(encode(Image.fromarray(picture, "LA"), "PNG"))
    np.testing.assert_allclose(found[:, :, 0], [[255, 0], [255 - 155 * 128 / 255, 200]], atol=1)


def test_palette_png_with_a_transparent_entry() -> None:
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    wanted = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]])
    np.testing.assert_array_equal(decode_image(encode(picture, "PNG")), wanted)
    wanted[:, 1] = 255
    np.testing.assert_array_equal(decode_image(encode(picture, "PNG", transparency=1)), wanted)


def test_a_colour_key_makes_that_colour_white() -> None:
    picture = np.array([[[10, 20, 30], [0, 0, 0]], [[9, 20, 30], [10, 20, 30]]], np.uint8)
    found = decode_image(encode(picture, "PNG", transparency=(10, 20, 30)))
    np.testing.assert_array_equal(found, [[[255] * 3, [0] * 3], [[9, 20, 30], [255] * 3]])


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_gray_keeps_the_high_byte(form: str) -> None:
    samples = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], np.uint16)
    found = decode_image(encode(Image.fromarray(samples), form))
    np.testing.assert_array_equal(found[:, :, 0], [[0, 0, 1], [0x12, 0x80, 0xFF]])
    assert (found == found[:, :, :1]).all()


def test_sixteen_bit_colour_png_keeps_the_high_byte() -> None:
    samples = np.random.default_rng(0).integers(0, 65_536, (4, 5, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    np.testing.assert_array_equal(decode_image(png(5, 4, 16, 2, rows)), samples >> 8)


def test_sixteen_bit_colour_png_with_alpha_lies_over_white() -> None:
    samples = np.zeros((2, 2, 4), np.uint16)
    samples[0] = (0x4000, 0x8000, 0xC000, 0xFFFF)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    found = decode_image(png(2, 2, 16, 6, rows))
    np.testing.assert_array_equal(found, [[[0x40, 0x80, 0xC0]] * 2, [[255] * 3] * 2])


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_colour_tiff_keeps_the_high_byte(order: str) -> None:
    samples = np.random.default_rng(1).integers(0, 65_536, (4, 5, 3), dtype=np.uint16)
    entries = [(256, 3, 1, 5), (257, 3, 1, 4), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 1, 256), (277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 1, samples.nbytes)]
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        short = kind == 3 and count == 1
        directory += struct.pack(f"{order}HHI", tag, kind, count)
        directory += struct.pack(f"{order}HH" if short else f"{order}I", *((value, 0) if short else (value,)))
    data = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + directory + b"\0" * 4
    data = data.ljust(200, b"\0") + struct.pack(f"{order}HHH", 16, 16, 16)
    data = data.ljust(256, b"\0") + samples.astype(f"{order}u2").tobytes()
    np.testing.assert_array_equal(decode_image(data), samples >> 8)


def test_white_is_zero_tiff_is_turned_around() -> None:
    samples = np.array([[0, 0x1200], [0x8000, 0xFF00]], np.uint16)
    data = bytearray(encode(Image.fromarray(samples), "TIFF"))
    at = data.index(struct.pack("<HHI", 262, 3, 1)) + 8
    data[at : at + 2] = b"\0\0"
    np.testing.assert_array_equal(decode_image(bytes(data))[:, :, 0], [[255, 255 - 0x12], [127, 0]])


def test_cmyk_jpeg_becomes_rgb() -> None:
    cmyk = Image.fromarray(UPRIGHT).convert("CMYK")
    found = decode_image(encode(cmyk, "JPEG", quality=95))
    assert np.abs(found.astype(int) - UPRIGHT).mean() < 6, "an inverted picture would differ by far more"


# --- orientation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_each_exif_orientation_comes_out_upright(form: str, orientation: int) -> None:
    stored = stored_as(UPRIGHT, orientation)
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(form, {})
    if form == "TIFF":
        options = {"tiffinfo": {274: orientation}}
    else:
        options = {**options, "exif": exif(orientation, "<" if orientation % 2 else ">")}
    data = encode(stored, form, **options)
    found = decode_image(data)
    assert found.shape == UPRIGHT.shape
    assert np.abs(found.astype(int) - UPRIGHT).mean() < (6 if form == "JPEG" else 0.01)


def test_turning_upright_undoes_what_the_camera_did() -> None:
    for orientation in range(1, 9):
        np.testing.assert_array_equal(turn_upright(stored_as(UPRIGHT, orientation), orientation), UPRIGHT)
    for unknown in (0, 9, -1):
        np.testing.assert_array_equal(turn_upright(UPRIGHT, unknown), UPRIGHT)


@pytest.mark.parametrize(
    "block",
    [b"", b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0XX*\0\x08\0\0\0\1\0", exif(0), exif(9), exif(6)[:-9], exif(6)[:16]],
    ids=range(8),
)
def test_a_broken_exif_block_means_upright(block: bytes) -> None:
    found = decode_image(encode(UPRIGHT, "JPEG", quality=95, exif=block))
    assert found.shape == UPRIGHT.shape


def test_the_size_of_a_thumbnail_in_the_exif_block_is_not_taken_for_the_picture() -> None:
    thumbnail = encode(gradient(8, 8), "JPEG")
    data = encode(UPRIGHT, "JPEG", exif=exif(1) + thumbnail)
    assert decode_image(data).shape == UPRIGHT.shape


# --- animations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(form: str) -> None:
    frames = [Image.fromarray(np.full((9, 7, 3), shade, np.uint8)) for shade in (10, 200, 90)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert (decode_image(data) == 10).all()


@pytest.mark.parametrize("form", ["GIF", "ICO", "PDF", "JPEG2000"])
def test_a_known_format_that_is_not_taken_is_named(form: str) -> None:
    with pytest.raises(DecodeError, match=f"^{form.replace('JPEG2000', 'JPEG 2000')} is not accepted; convert it"):
        decode_image(encode(UPRIGHT, form))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_an_empty_file_is_empty() -> None:
    assert reason_for(b"") == "empty"


@pytest.mark.parametrize("data", [b"hello, this is no picture\n", b"\0" * 100, b"\xff\xd8", b"{}", b"<html>"], ids=repr)
def test_text_named_jpg_is_no_image(data: bytes) -> None:
    assert reason_for(data) == "not_an_image"


def test_the_byte_limit_counts_the_file() -> None:
    data = encode(UPRIGHT, "PNG")
    assert reason_for(data, max_bytes=len(data) - 1) == "too_many_bytes"
    assert decode_image(data, DecodeLimits(max_bytes=len(data))).shape == UPRIGHT.shape


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_the_pixel_limit_counts_width_times_height(form: str) -> None:
    height, width = UPRIGHT.shape[:2]
    data = encode(UPRIGHT, form)
    assert reason_for(data, max_pixels=height * width - 1) == "too_many_pixels"
    assert decode_image(data, DecodeLimits(max_pixels=height * width)).shape == UPRIGHT.shape


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1)])
def test_a_single_row_or_pixel_is_too_small(form: str, height: int, width: int) -> None:
    assert reason_for(encode(gradient(height, width), form)) == "too_small"


def _huge_jpeg() -> bytes:
    data = bytearray(encode(UPRIGHT, "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


def _huge_bmp() -> bytes:
    data = bytearray(encode(UPRIGHT, "BMP"))
    data[18:26] = struct.pack("<ii", 60_000, 60_000)
    return bytes(data)


def _huge_tiff() -> bytes:
    data = bytearray(encode(UPRIGHT, "TIFF"))
    for tag in (256, 257):
        at = next(at for kind in (3, 4) if (at := data.find(struct.pack("<HHI", tag, kind, 1))) > 0)
        data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, 60_000)
    return bytes(data)


def _huge_webp() -> bytes:
    chunk = struct.pack("<B3x", 0) + (16_382).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + chunk + encode(UPRIGHT, "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _huge_png() -> bytes:
    return png(60_000, 60_000, 8, 2, b"")


@pytest.mark.parametrize("make", [_huge_jpeg, _huge_png, _huge_bmp, _huge_tiff, _huge_webp])
def test_a_huge_header_is_refused_before_a_pixel_is_decoded(
    make: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the decoder was reached")

    monkeypatch.setattr(cv2, "imdecode", never)
    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    assert reason_for(make()) == "too_many_pixels"


def test_a_tiff_of_few_pixels_and_a_huge_tile_is_refused() -> None:
    data = bytearray(encode(UPRIGHT, "TIFF"))
    # the strip tags become tile tags: width and length of a tile, its offset and byte count
    for old, new, value in ((273, 324, None), (278, 322, 60_000), (279, 325, None)):
        at = next(at for kind in (3, 4) if (at := data.find(struct.pack("<HHI", old, kind, 1))) > 0)
        data[at : at + 2] = struct.pack("<H", new)
        if value:
            data[at : at + 12] = struct.pack("<HHII", new, 4, 1, value)
    at = next(at for kind in (3, 4) if (at := data.find(struct.pack("<HHI", 277, kind, 1))) > 0)
    data[at : at + 12] = struct.pack("<HHII", 323, 4, 1, 60_000)
    assert reason_for(bytes(data)) in ("too_many_pixels", "unsupported", "corrupt")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_file_that_ends_early_is_truncated(form: str, share: float) -> None:
    data = encode(noise(64, 64), form)
    assert reason_for(data[: int(len(data) * share)]) == "truncated"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_a_compressed_tiff_that_lacks_its_last_bytes_is_truncated(compression: str, big: bool) -> None:
    data = encode(gradient(40, 40), "TIFF", compression=compression, big_tiff=big)
    for lost in (1, 20, 150, len(data) // 2, len(data) - 16):
        assert reason_for(data[:-lost]) == "truncated"


def test_nothing_but_the_error_is_told_of_a_damaged_file() -> None:
    """Pillow warns of what it passes over, in lines of its own."""
    cut = encode(gradient(40, 40), "TIFF", compression="tiff_lzw")[:-1]
    program = "import sys; from data.decode import decode_image; decode_image(sys.stdin.buffer.read())"
    done = subprocess.run([sys.executable, "-c", program], input=cut, capture_output=True, check=False)
    assert done.stderr.splitlines()[-1].startswith(b"data.decode.DecodeError: this TIFF ends")
    assert b"Warning" not in done.stderr


def test_a_cut_progressive_jpeg_is_truncated() -> None:
    data = encode(noise(64, 64), "JPEG", progressive=True)
    for share in (0.2, 0.5, 0.9):
        assert reason_for(data[: int(len(data) * share)]) == "truncated"


@pytest.mark.parametrize("padding", [b"", b"\0" * 40], ids=["cut", "padded"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker_is_truncated(progressive: bool, padding: bytes) -> None:
    # zeros in place of the last bytes (a download that was preallocated) would decode to a picture with gray rows
    data = encode(noise(40, 50), "JPEG", quality=95, progressive=progressive)
    assert data.endswith(b"\xff\xd9")
    for lost in (2, 40, 1000):
        assert reason_for(data[:-lost] + padding) == "truncated"


def test_bytes_after_the_picture_are_ignored() -> None:
    for form in ("JPEG", "PNG", "WEBP"):
        data = encode(UPRIGHT, form)
        np.testing.assert_array_equal(decode_image(data + b"\0more"), decode_image(data))


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = encode(UPRIGHT, "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    assert reason_for(data[:at] + scan * 5_000 + data[-2:]) == "corrupt"


def test_a_large_jpeg_of_many_scans_is_refused_and_a_small_one_is_not() -> None:
    """190 scans of 64 megapixels keep a core busy for seconds; of a stamp they do not matter."""
    for side, wanted in ((4096, "corrupt"), (64, None)):
        data = encode(np.zeros((side, side, 3), np.uint8), "JPEG", progressive=True)
        at = data.rindex(b"\xff\xda")
        data = data[:at] + data[at:-2] * 100 + data[-2:]
        if wanted:
            assert reason_for(data) == wanted
        else:
            assert decode_image(data).shape == (side, side, 3)


def test_millions_of_empty_segments_or_fill_bytes_are_refused_at_once() -> None:
    assert reason_for(b"\xff\xd8" + b"\xff\xe0\0\x02" * 2_000_000) == "corrupt"
    assert reason_for(b"\xff\xd8" + b"\xff" * 8_000_000) == "truncated"


def test_damaged_png_rows_are_corrupt() -> None:
    data = bytearray(encode(noise(32, 32), "PNG"))
    at = data.index(b"IDAT") + 40
    data[at : at + 20] = b"\0" * 20
    assert reason_for(bytes(data)) in ("corrupt", "truncated")


def test_floating_point_samples_have_no_agreed_white() -> None:
    assert reason_for(encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")) == "unsupported"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_random_damage_gives_a_picture_or_a_reason_and_nothing_else(form: str) -> None:
    data = encode(gradient(), form)
    rng = np.random.default_rng(7)
    outcomes = {"picture": 0, "refused": 0}
    for _ in range(300):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            damaged[at] = rng.integers(0, 256)
        try:
            found = decode_image(bytes(damaged), DecodeLimits(max_pixels=1_000_000))
            assert found.dtype == np.uint8
            assert found.ndim == 3
            assert found.shape[2] == 3
            outcomes["picture"] += 1
        except DecodeError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


def test_a_decode_error_survives_the_way_back_from_a_worker_process() -> None:
    error = DecodeError("truncated", "it ends early")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.reason, str(again)) == (DecodeError, "truncated", "it ends early")


def test_threads_decode_side_by_side() -> None:
    files = [encode(noise(40, 50, seed), form) for seed, form in enumerate(["PNG", "JPEG", "WEBP", "BMP"] * 4)]
    alone = [decode_image(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(decode_image, files * 5), alone * 5, strict=True):
            np.testing.assert_array_equal(found, wanted)
