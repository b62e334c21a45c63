"""A heap with planted copies in, a set without them out, and a record of every image."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import curation.images
from curation.command import CurationOptions
from curation.deduplicate import DeduplicateSpec, deduplicate, join_near
from curation.filters import FilterSpec, blur_boxes, load_hook
from curation.folder import Stage
from curation.neighbours import SearchSpec
from data.crops import CropSpec
from data.datasets import open_dataset
from data.errors import InputError
from data.loader import ViewLoader
from tests.curation.images import PixelRuntime, boxes, make_heap, picture, save

REPO = Path(__file__).parents[2]
CKPT = str(REPO / "models" / "dinoscope_tiny.safetensors")
SPEC = DeduplicateSpec(threshold=0.9, eval_threshold=0.9, whiten=0)
"""For the pixels that stand in for a network; whitening needs more images than these."""


def run(
    heap: Path, out: Path, evaluation: Path | None = None, spec: DeduplicateSpec = SPEC, **options: object
) -> dict[str, dict]:
    held = None if evaluation is None else open_dataset(evaluation)
    filters = FilterSpec(reject=options.pop("reject", None))  # type: ignore[arg-type]
    given = CurationOptions(ckpt=CKPT, data=str(heap), out=out, threads=1, **options)  # type: ignore[arg-type]
    deduplicate(open_dataset(heap), held, given, spec, filters, SearchSpec())
    with (out / "decisions.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def heap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_heap(tmp_path_factory.mktemp("heap") / "images")


@pytest.fixture(scope="module", autouse=True)
def pixel_runtime() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curation.images, "open_runtime", lambda *_, **__: PixelRuntime())
        yield


@pytest.fixture(scope="module")
def curated(heap: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    out = tmp_path_factory.mktemp("curated")
    return out, run(heap, out)


def test_every_image_has_its_decision_and_each_filter_its_reason(
    heap: Path, curated: tuple[Path, dict[str, dict]]
) -> None:
    _, found = curated
    assert set(found) == {path.name for path in heap.iterdir()}
    for name, reason in (("small", "small"), ("long", "shape"), ("flat", "constant"), ("broken", "broken")):
        row = next(row for row in found.values() if row["name"].startswith(f"x_{name}"))
        assert (row["decision"], row["stage"]) == ("dropped", "filter")
        assert row["reason"].startswith(reason)


@pytest.mark.parametrize(
    ("kind", "original"), [("resize", "o001.png"), ("recompress", "o002.png"), ("flip", "o003.png")]
)
def test_planted_copies_are_dropped_for_the_larger_original(
    kind: str, original: str, curated: tuple[Path, dict[str, dict]]
) -> None:
    _, found = curated
    assert found[f"copy_{kind}.png"]["decision"] == "dropped"
    assert found[f"copy_{kind}.png"]["stage"] in ("hash", "embedding")
    assert found[f"copy_{kind}.png"]["of"] == original
    assert found[original]["decision"] == "kept"


def test_what_is_kept_can_be_trained_on_directly(curated: tuple[Path, dict[str, dict]]) -> None:
    out, found = curated
    kept = [name for name, row in found.items() if row["decision"] == "kept"]
    dataset = open_dataset(out / "kept.csv")
    assert sorted(Path(item.name).name for item in dataset.items) == sorted(kept)
    loader = ViewLoader(dataset, CropSpec(global_px=32, local_px=16, n_local=1), batch_size=len(kept))
    assert [len(view) for view in next(iter(loader.epoch(0)))] == [len(kept)] * 3


def test_the_page_and_the_summary_tell_the_counts(curated: tuple[Path, dict[str, dict]]) -> None:
    out, found = curated
    summary = json.loads((out / "summary.json").read_text())
    assert summary["counts"]["images"] == len(found)
    assert summary["counts"]["kept"] == sum(row["decision"] == "kept" for row in found.values())
    page = (out / "report.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert "http" not in page


def test_the_same_command_again_computes_nothing_and_gives_the_same_list(
    heap: Path, curated: tuple[Path, dict[str, dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = curated
    monkeypatch.setattr(curation.images, "embed_block", None)
    monkeypatch.setattr(curation.images, "look_block", None)
    assert run(heap, out) == found


@pytest.mark.parametrize("function", ["look_block", "embed_block"])
def test_interrupted_at_any_block_it_goes_on_and_gives_the_same_list(
    function: str, heap: Path, curated: tuple[Path, dict[str, dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curation.images, "BLOCK_IMAGES", 8)
    monkeypatch.setattr(curation.images.blocks_of, "__defaults__", (8,))
    real, calls = getattr(curation.images, function), []

    def interrupted(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(curation.images, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(heap, tmp_path / "out")
    assert run(heap, tmp_path / "out") == curated[1]


def test_interrupted_before_any_stage_is_done_it_goes_on_and_gives_the_same_list(
    heap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "eval" / "held.png", cv2.resize(picture(7), (70, 70)))

    def curate(out: Path) -> tuple[dict[str, dict], list[str]]:
        found = run(heap, out, tmp_path / "eval", replace(SPEC, whiten=4), form="shards")
        return found, [item.row["name"] for item in open_dataset(out / "shards").items]

    wanted, finish, stages = curate(tmp_path / "whole"), Stage.finish, 0
    for stop in range(1, 20):
        calls: list[Stage] = []

        def interrupted(stage: Stage, *counts: object, stop: int = stop, calls: list[Stage] = calls) -> None:
            calls.append(stage)
            if len(calls) == stop:
                raise KeyboardInterrupt
            finish(stage, *counts)  # type: ignore[arg-type]

        out = tmp_path / f"stopped{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "finish", interrupted)
            try:
                assert curate(out) == wanted
                break
            except KeyboardInterrupt:
                stages += 1
        assert curate(out) == wanted
    assert stages == 11  # looks, embeddings, whitenings and indexes of both sets, two searches, shards


def test_shards_are_those_of_the_last_settings_whatever_was_written_before(heap: Path, tmp_path: Path) -> None:
    def kept(spec: DeduplicateSpec) -> list[str]:
        found = run(heap, tmp_path / "out", spec=spec, form="shards")
        names = [item.row["name"] for item in open_dataset(tmp_path / "out" / "shards").items]
        assert names == [name for name, row in found.items() if row["decision"] == "kept"]
        return names

    strict, loose = (replace(SPEC, threshold=threshold) for threshold in (0.5, 0.99))
    first = kept(strict)
    assert kept(loose) != first
    assert kept(strict) == first


def test_images_near_an_evaluation_set_are_dropped_and_name_it(heap: Path, tmp_path: Path) -> None:
    save(tmp_path / "eval" / "held.png", cv2.resize(picture(7), (70, 70)))
    found = run(heap, tmp_path / "out", tmp_path / "eval")
    assert (found["o007.png"]["stage"], found["o007.png"]["of"]) == ("evaluation", "held.png")
    assert found["o009.png"]["decision"] == "kept"


def test_all_of_a_component_falls_with_the_one_that_is_near_an_evaluation_image(tmp_path: Path) -> None:
    within, across = tmp_path / "within.npz", tmp_path / "across.npz"
    np.savez(within, pairs=np.array([[0, 1], [1, 2], [3, 4]]), cosines=np.array([0.5, 0.5, 0.9], np.float32))
    np.savez(across, pairs=np.array([[2, 8]]), cosines=np.array([0.47], np.float32))
    near = join_near([within], [across], np.array([1, 1, 1, 5, 9]), DeduplicateSpec())
    assert near.eval_row_m.tolist() == [8, 8, 8, -1, -1]
    assert near.component_m.tolist() == [0, 1, 2, 3, 3]
    assert near.best_m.tolist() == [0, 1, 2, 4, 4]


def test_hooks_reject_images_and_blur_regions_of_those_written(heap: Path, tmp_path: Path) -> None:
    found = run(heap, tmp_path / "out", reject="tests.curation.images:hook", blur="tests.curation.images:boxes")
    assert found["o020.png"]["reason"] == "rejected by tests.curation.images:hook"
    shards = open_dataset(tmp_path / "out" / "shards")
    names = [item.row["name"] for item in shards.items]
    written = shards.image(names.index("o009.png"))
    assert np.array_equal(written, blur_boxes(picture(9), boxes(picture(9))))
    assert not np.array_equal(written[:40, :40], picture(9)[:40, :40])
    assert np.array_equal(written[50:, 50:], picture(9)[50:, 50:])


def test_shards_hold_the_very_bytes_with_names_labels_and_splits(tmp_path: Path) -> None:
    for seed in range(12):
        save(tmp_path / "set" / "train" / f"class{seed % 2}" / f"{seed}.png", picture(seed))
    run(tmp_path / "set", tmp_path / "out", form="shards")
    shards, original = open_dataset(tmp_path / "out" / "shards"), open_dataset(tmp_path / "set")
    by_name = {item.name: row for row, item in enumerate(original.items)}
    assert len(shards) == 12
    for row, item in enumerate(shards.items):
        source = by_name[item.row["name"]]
        assert shards.read(row) == original.read(source)
        assert (item.label, item.split) == (original.items[source].label, "train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeduplicateSpec(threshold=1.5), "wanted a cosine"),
        (lambda: DeduplicateSpec(k=0), "wanted at least 1 neighbour"),
        (lambda: DeduplicateSpec(hash_bits=64), "wanted 0 to"),
        (lambda: load_hook("no.such:thing", "--reject"), "--reject no.such:thing: cannot be imported"),
        (lambda: load_hook("json", "--blur"), "wanted MODULE:FUNCTION"),
        (lambda: CurationOptions(ckpt="c", data="d", out=Path("o"), form="csv", blur="a:b"), "use --form shards"),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_heap_of_which_nothing_is_left_is_told_in_one_line_with_status_2(tmp_path: Path) -> None:
    save(tmp_path / "heap" / "a.png", np.full((64, 64, 3), 9, np.uint8))
    command = [
        sys.executable,
        "-m",
        "curation.deduplicate",
        "--ckpt",
        CKPT,
        "--data",
        str(tmp_path / "heap"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the filters dropped" in done.stderr.splitlines()[-1]


def test_a_folder_that_is_something_else_is_left_alone(heap: Path) -> None:
    with pytest.raises(InputError, match="is not empty and holds no curation"):
        run(heap, heap)
