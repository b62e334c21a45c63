"""One extraction for all evaluators: order, corrupt images, damaged weights, and what the cache answers to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.datasets import open_dataset
from data.errors import CheckFailed, InputError
from data.preprocess import center_view
from evaluators.extract import ExtractSpec, extract, inspect
from evaluators.view_batches import ViewSpec
from tests.evaluators.fakes import SMALL, MeanColourRuntime, colour_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return colour_folder(tmp_path / "data")


def test_rows_follow_the_data_set_whatever_the_batch_size(folder: Path) -> None:
    dataset = open_dataset(folder)
    whole = extract(MeanColourRuntime(), dataset, ExtractSpec(batch_size=100))
    for batch_size in (1, 7, 36):
        table = extract(MeanColourRuntime(), dataset, ExtractSpec(batch_size=batch_size))
        assert table.names == tuple(item.name for item in dataset.items)
        assert table.labels == tuple(item.label for item in dataset.items)
        np.testing.assert_array_equal(table.features, whole.features)
    wanted = [center_view(dataset.image(i), SMALL).mean(axis=(1, 2)) for i in range(len(dataset))]
    np.testing.assert_allclose(whole.features, wanted, atol=1e-5)
    np.testing.assert_allclose(whole.columns["patch_mean"], wanted, atol=1e-5)


def test_few_corrupt_images_are_left_out_and_listed(folder: Path) -> None:
    (folder / "train" / "red" / "3.png").write_bytes(b"")
    dataset = open_dataset(folder)
    table = extract(MeanColourRuntime(), dataset, ExtractSpec(batch_size=5))
    assert table.skipped == (("train/red/3.png", "empty"),)
    assert len(table) == len(dataset) - 1 == len(table.features)
    assert "train/red/3.png" not in table.names
    clean = extract(MeanColourRuntime(), dataset.subset(table.rows))
    np.testing.assert_array_equal(table.features, clean.features)


def test_too_many_corrupt_images_end_it_with_their_number_and_a_name(folder: Path, tmp_path: Path) -> None:
    for i in range(4):
        (folder / "train" / "red" / f"{i}.png").write_text("no image")
    spec = ExtractSpec(cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match=r"4 of 36 images cannot be decoded .*train/red/0\.png.* more than the 5%"):
        extract(MeanColourRuntime(), open_dataset(folder), spec)
    table = extract(MeanColourRuntime(), open_dataset(folder), replace(spec, max_corrupt_share=0.2))
    assert len(table) == 32


def test_features_that_are_not_finite_fail_and_leave_nothing_in_the_cache(folder: Path, tmp_path: Path) -> None:
    spec = ExtractSpec(cache_dir=tmp_path / "cache", batch_size=10)
    with pytest.raises(CheckFailed, match=r"not finite, first of 'train/green/4\.png'"):
        extract(MeanColourRuntime(spoil=12), open_dataset(folder), spec)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_a_second_extraction_runs_no_network(folder: Path, tmp_path: Path) -> None:
    spec = ExtractSpec(cache_dir=tmp_path / "cache")
    first, second = MeanColourRuntime(), MeanColourRuntime()
    fresh = extract(first, open_dataset(folder), spec)
    again = extract(second, open_dataset(folder), spec)
    assert (first.images, second.images) == (36, 0)
    assert (fresh.cached, again.cached) == (False, True)
    np.testing.assert_array_equal(fresh.features, again.features)
    assert fresh.names == again.names


def test_the_cache_answers_only_to_the_same_weights_preprocessing_view_and_images(folder: Path, tmp_path: Path) -> None:
    spec = ExtractSpec(cache_dir=tmp_path / "cache")
    extract(MeanColourRuntime(), open_dataset(folder), spec)
    other_preprocess = replace(SMALL, resize_px=40)
    for runtime in (MeanColourRuntime("one weight differs"), MeanColourRuntime(preprocess=other_preprocess)):
        extract(runtime, open_dataset(folder), spec)
        assert runtime.images == 36
    runtime = MeanColourRuntime()
    extract(runtime, open_dataset(folder), replace(spec, view=ViewSpec(view="whole")))
    (folder / "val" / "red" / "0.png").unlink()
    extract(runtime, open_dataset(folder), spec)
    assert runtime.images == 36 + 35


def test_a_killed_extraction_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    spec = ExtractSpec(cache_dir=tmp_path / "cache", batch_size=5)
    dying, next_one = MeanColourRuntime(), MeanColourRuntime()
    dying.die_after = 20
    with pytest.raises(KeyboardInterrupt):
        extract(dying, open_dataset(folder), spec)
    table = extract(next_one, open_dataset(folder), spec)
    assert next_one.images == 36 - dying.images == 16
    np.testing.assert_array_equal(table.features, extract(MeanColourRuntime(), open_dataset(folder)).features)


def test_a_server_that_dies_half_way_is_one_error_and_the_next_one_goes_on(folder: Path, tmp_path: Path) -> None:
    class Dying(MeanColourRuntime):
        def run(self, pixels_NCHW, outputs=("embedding",)):
            if self.images >= 15:
                raise InputError("grpc://host:8001: the server gave no result (unavailable)")
            return super().run(pixels_NCHW, outputs)

    spec, dying = ExtractSpec(cache_dir=tmp_path / "cache", batch_size=5), Dying()
    dying.device = "remote"
    with pytest.raises(
        InputError, match=r"gave no result.*15 of 36 images are saved: .* the same command goes on from there"
    ):
        extract(dying, open_dataset(folder), spec)
    with pytest.raises(InputError, match="nothing is kept without --cache-dir"):
        extract(dying, open_dataset(folder), ExtractSpec(batch_size=5))
    back = MeanColourRuntime()
    back.device = "remote"
    table = extract(back, open_dataset(folder), spec)
    assert back.images == 36 - 15
    np.testing.assert_array_equal(table.features, extract(MeanColourRuntime(), open_dataset(folder)).features)


def test_an_output_the_network_lacks_is_named(folder: Path) -> None:
    runtime = MeanColourRuntime()
    runtime.outputs = ("embedding",)
    assert list(extract(runtime, open_dataset(folder)).columns) == ["embedding"]
    with pytest.raises(InputError, match=r"no output 'patches'.*it has embedding"):
        extract(runtime, open_dataset(folder), ExtractSpec(columns=("patches",)))


def test_sanity_counts_empty_and_repeated_rows() -> None:
    sanity = inspect(np.array([[0, 0], [3, 4], [3, 4], [0, 2], [0, 0]], dtype=np.float32))
    assert (sanity.zero_rows, sanity.duplicate_rows) == (2, 2)
    assert (sanity.norm_min, sanity.norm_median, sanity.norm_max) == (0, 2, 5)
    assert len(sanity.notes("train")) == 2
