"""Extraction by several processes: the same features as by one, errors that arrive, and work that is not lost."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.datasets import open_dataset
from data.errors import InputError
from evaluators import knn
from evaluators.classification import ClassificationRun
from evaluators.extract import ExtractSpec, available_columns, extract, extraction_key
from evaluators.feature_cache import open_store
from evaluators.processes import Helpers, extract_by_processes
from runtimes.open import open_runtime
from tests.evaluators.fakes import colour_folder, small_checkpoint


def test_several_processes_leave_what_one_would_have_left(tmp_path: Path) -> None:
    ckpt = small_checkpoint(tmp_path / "a.safetensors")
    folder = colour_folder(tmp_path / "data")
    (folder / "val" / "red" / "0.png").write_bytes(b"")
    dataset, spec = open_dataset(folder), ExtractSpec(cache_dir=tmp_path / "cache", batch_size=4)
    helpers = Helpers(str(ckpt), "cpu", 1, 2)
    with open_runtime(ckpt, device="cpu", threads=1) as runtime:
        alone = extract(runtime, dataset, replace(spec, cache_dir=None))
        # an earlier, stopped run by one process had come to row 6; a part of another was half done
        columns = available_columns(runtime, spec.columns)
        with open_store(spec.cache_dir, extraction_key(runtime, dataset, columns, spec), len(dataset)) as store:
            store.append({name: values[:6] for name, values in alone.columns.items()}, 6, {})
        extract_by_processes(runtime, dataset, spec, helpers)
        together = extract(runtime, dataset, spec)
        assert together.cached
        assert together.skipped == alone.skipped == (("val/red/0.png", "empty"),)
        assert together.names == alone.names
        for name, values in alone.columns.items():
            np.testing.assert_allclose(together.columns[name], values, atol=1e-6)
        assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 1  # parts are cleared away


@pytest.mark.slow
def test_what_a_process_complains_about_arrives(tmp_path: Path) -> None:
    ckpt, spec = small_checkpoint(tmp_path / "a.safetensors"), ExtractSpec(cache_dir=tmp_path / "cache")
    dataset = open_dataset(colour_folder(tmp_path / "data", n_val=2))
    with open_runtime(ckpt, device="cpu", threads=1) as runtime, pytest.raises(InputError, match="no such file"):
        extract_by_processes(runtime, dataset, spec, Helpers(str(tmp_path / "gone.safetensors"), "cpu", 1, 2))


def test_processes_need_a_cache_to_meet_in() -> None:
    with pytest.raises(InputError, match="name a --cache-dir"):
        ClassificationRun(ckpt="a", data="b", processes=2, cache_dir=None)
    with pytest.raises(InputError, match="at least 1 of each"):
        ClassificationRun(ckpt="a", data="b", processes=0)


def test_what_processes_extract_now_is_not_told_to_come_from_the_cache(tmp_path: Path) -> None:
    ckpt = small_checkpoint(tmp_path / "a.safetensors")
    data = str(colour_folder(tmp_path / "data", n_val=2))
    options = ClassificationRun(
        ckpt=str(ckpt), data=data, device="cpu", threads=1, processes=2, cache_dir=tmp_path / "cache"
    )
    told = [knn.run(options, knn.KnnSpec(k=(1,)))["timing"]["features_from_cache"] for _ in range(2)]
    assert told == [False, True]
