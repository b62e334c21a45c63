"""Retrieval: who searches whom, the benchmarks as distributed, and ground truth that is not what it should be."""

import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.errors import CheckFailed, InputError
from evaluators.extract import FeatureTable
from evaluators.landmarks import landmarks_at, load_plain_pickle, open_landmarks
from evaluators.presets import evaluator_cli
from evaluators.results import load_predictions, load_result
from evaluators.retrieval import RetrievalRun, RetrievalSpec, evaluate, main, run
from tests.evaluators.fakes import colour_folder, small_checkpoint


def table(features: np.ndarray) -> FeatureTable:
    names = tuple(f"image{i}" for i in range(len(features)))
    return FeatureTable(
        names, (None,) * len(names), names, {"embedding": np.asarray(features, np.float32)}, tuple(range(len(names)))
    )


def by_hand(features: np.ndarray, keys: list[str], sides: list[str] | None) -> list[float]:
    """Average precision of each query, one comparison at a time."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    found = []
    for q in range(len(unit)):
        others = [i for i in range(len(unit)) if (i != q if sides is None else sides[i] != sides[q])]
        others.sort(key=lambda i: -float(unit[i] @ unit[q]))
        hits, precisions = 0, []
        for rank, i in enumerate(others, start=1):
            if keys[i] == keys[q]:
                hits += 1
                precisions.append(hits / rank)
        if precisions:
            found.append(sum(precisions) / len(precisions))
    return found


@pytest.mark.parametrize("across", [False, True])
def test_every_image_searches_the_others(across: bool) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 4))
    keys = [str(i // 3) for i in range(29)] + ["alone"]
    sides = [str(i % 2) for i in range(30)] if across else None
    found = evaluate(table(features), keys, sides, RetrievalSpec(across="vendor" if across else None))
    wanted = by_hand(features, keys, sides)
    assert found.metrics["map"].value == pytest.approx(np.mean(wanted))
    np.testing.assert_allclose(found.predictions["score"], wanted)
    assert len(wanted) == found.metrics["map"].n == 29
    assert any("1 images have nothing to find" in note for note in found.notes)


def test_perfect_features_find_everything_and_shared_values_are_needed() -> None:
    features = np.eye(5)[np.arange(20) % 5]
    keys = [str(i % 5) for i in range(20)]
    found = evaluate(table(features), keys)
    assert {name: metric.value for name, metric in found.metrics.items()} == {"map": 1, "top1": 1, "p5": 1, "p10": 1}
    with pytest.raises(InputError, match="none of the 20 images shares its value"):
        evaluate(table(features), [str(i) for i in range(20)])
    with pytest.raises(InputError, match="all 20 images share one value, so that any order is right"):
        evaluate(table(features), ["same"] * 20)
    spoilt = features.copy()
    spoilt[3, 0] = np.inf
    with pytest.raises(CheckFailed, match="image3"):
        evaluate(table(spoilt), keys)


@pytest.fixture
def oxford(tmp_path: Path) -> Path:
    return oxford_folder(tmp_path)


def oxford_folder(root: Path) -> Path:
    """The layout of Revisited Oxford: two queries, six database images, arrays and lists mixed as in the real file."""
    folder = root / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    rng = np.random.default_rng(0)
    colours = {"a": (200, 40, 40), "b": (40, 200, 40)}
    names = ["a0", "b0", "a1", "b1", "a2", "b2"]
    for name in [*names, "qa", "qb"]:
        image = np.full((40, 70, 3), colours[name[-1] if name[0] == "q" else name[0]]) + rng.integers(
            -9, 9, (40, 70, 3)
        )
        cv2.imwrite(str(folder / "jpg" / f"{name}.jpg"), image.astype(np.uint8))
    gnd = [
        {"bbx": [5.0, 5.0, 60.5, 38.0], "easy": np.array([0, 2]), "hard": [4], "junk": []},
        {"bbx": np.array([0.0, 0, 70, 40]), "easy": [1], "hard": np.array([3, 5]), "junk": []},
    ]
    with (folder / "gnd_roxford5k.pkl").open("wb") as file:
        pickle.dump({"gnd": gnd, "imlist": names, "qimlist": ["qa", "qb"]}, file)
    return root


def hard_oxford_folder(root: Path) -> Path:
    """As `oxford_folder`, but noise throughout and right by chance only, so that figures hang on every detail of a view."""
    folder, rng = root / "roxford5k", np.random.default_rng(3)
    (folder / "jpg").mkdir(parents=True)
    names, asked = [f"d{i:02d}" for i in range(14)], [f"q{i}" for i in range(5)]
    for name in [*names, *asked]:
        image = cv2.resize(rng.integers(0, 255, (4, 6, 3)).astype(np.uint8), (90, 60))
        cv2.imwrite(str(folder / "jpg" / f"{name}.jpg"), image)
    kinds = [rng.permutation(14) for _ in asked]
    gnd = [
        {"bbx": [20.0, 10.0, 60.0, 50.0], "easy": of[:2].tolist(), "hard": of[2:4].tolist(), "junk": of[4:6].tolist()}
        for of in kinds
    ]
    with (folder / "gnd_roxford5k.pkl").open("wb") as file:
        pickle.dump({"gnd": gnd, "imlist": names, "qimlist": asked}, file)
    return root


def test_two_processes_find_in_revisited_oxford_what_one_finds(tmp_path: Path) -> None:
    """The command as it is typed: views of many sizes, queries cropped to their boxes, several scales."""
    data, ckpt = hard_oxford_folder(tmp_path / "data"), small_checkpoint(tmp_path / "a.safetensors")
    results, found = [], []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        words = f"--ckpt {ckpt} --data roxford5k:{data} --size-px 64 --threads 1 --processes {processes} --out {out}"
        evaluator_cli(main, [*words.split(), "--cache-dir", str(tmp_path / f"cache{processes}")])
        results.append(load_result(out))
        found.append(load_predictions(out, results[-1]))
    one, two = results
    assert one["metrics"] == two["metrics"]
    assert 0 < one["metrics"]["map_medium"]["value"] < 1
    assert one["settings"]["queries_cropped"]
    for key in ("names", "score", "neighbours"):
        np.testing.assert_array_equal(found[0][key], found[1][key])


def test_revisited_oxford_is_read_as_distributed(oxford: Path, tmp_path: Path) -> None:
    ckpt = small_checkpoint(tmp_path / "a.safetensors")
    for data in (f"roxford5k:{oxford}", str(oxford / "roxford5k")):
        options = RetrievalRun(ckpt=str(ckpt), data=data, cache_dir=None, threads=1, baselines=("pixels",))
        result = run(options, RetrievalSpec(size_px=64, scales=(1.0, 0.5)))
        assert (result["data"]["n_database"], result["data"]["n_queries"]) == (6, 2)
        assert result["baselines"]["pixels"]["metrics"]["map_medium"]["value"] == 1.0
        assert set(result["metrics"]) == {
            f"{m}_{s}" for m in ("map", "mp1", "mp5", "mp10") for s in ("easy", "medium", "hard")
        }
        assert result["headline"] == "map_medium"
        assert result["settings"]["queries_cropped"]
        assert result["preprocess"]["view_size_px"] == 64


def test_queries_are_cropped_to_their_box_unless_the_preset_says_otherwise(oxford: Path) -> None:
    benchmark = landmarks_at(f"roxford5k:{oxford}")
    assert benchmark is not None
    _, _, cropped = open_landmarks(benchmark, True)
    _, _, whole = open_landmarks(benchmark, False)
    assert cropped.image(0).shape == (33, 55, 3)
    assert whole.image(0).shape == (40, 70, 3)
    assert cropped.fingerprint() != whole.fingerprint()
    part = cropped.subset([1, 0])  # as several processes share the queries out
    assert [part.image(i).shape for i in range(2)] == [(40, 70, 3), (33, 55, 3)]
    assert part.fingerprint() != whole.subset([1, 0]).fingerprint()
    assert RetrievalSpec(preset="dino").for_benchmark("roxford5k") == (224, (1.0,), False)
    assert RetrievalSpec(preset="dino").for_benchmark("rparis6k")[0] == 512
    assert RetrievalSpec().for_benchmark("rparis6k")[2]


class Payload:
    def __reduce__(self):
        return os.system, ("touch /nonexistent/never",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_ground_truth_that_wants_to_run_something_is_refused(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps({"gnd": [Payload()]}, protocol))
    with pytest.raises(InputError, match=r"it asks for (posix|nt)\.system.*nothing in it was run"):
        load_plain_pickle(path)
    path.write_bytes(pickle.dumps({"gnd": np.array([{}], dtype=object)}, protocol))
    with pytest.raises(InputError, match="not a ground truth of plain values"):
        load_plain_pickle(path)


def test_numbers_in_arrays_of_any_kind_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plain.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        value = {
            "a": np.arange(6, dtype=">i4").reshape(2, 3),
            "b": [np.float64(1.5), np.int64(3)],
            "c": ("x", b"y", None),
            "d": np.array([], np.int64),
        }
        path.write_bytes(pickle.dumps(value, protocol))
        found = load_plain_pickle(path)
        np.testing.assert_array_equal(found["a"], value["a"])
        assert (found["b"], found["c"], len(found["d"])) == ([1.5, 3], ["x", b"y", None], 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("qimlist"), "wanted imlist, qimlist and gnd"),
        (lambda d: d["gnd"].pop(), "2 queries but ground truth for 1"),
        (lambda d: d["gnd"][0].update(easy=[99]), "image 99 of 6"),
        (lambda d: d["gnd"][0].update(bbx=[0, float("nan"), 9, 9]), "a box is 0 nan 9 9; wanted imlist"),
        (lambda d: d["imlist"].__setitem__(0, "../../etc/passwd"), "no plain file name"),
        (lambda d: d["imlist"].__setitem__(0, "gone"), r"gone\.jpg: missing"),
    ],
)
def test_a_ground_truth_that_does_not_fit_is_one_clear_error(oxford: Path, change, message: str) -> None:
    path = oxford / "roxford5k" / "gnd_roxford5k.pkl"
    plain = pickle.loads(path.read_bytes())
    change(plain)
    path.write_bytes(pickle.dumps(plain))
    benchmark = landmarks_at(f"roxford5k:{oxford}")
    assert benchmark is not None
    with pytest.raises(InputError, match=message):
        open_landmarks(benchmark, True)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="not a ground truth"):
        open_landmarks(benchmark, True)


def test_class_folders_and_columns_say_what_is_alike(tmp_path: Path) -> None:
    ckpt = small_checkpoint(tmp_path / "a.safetensors")
    data = colour_folder(tmp_path / "data", n_val=5)
    options = RetrievalRun(ckpt=str(ckpt), data=str(data), cache_dir=None, threads=1, baselines=("pixels", "hog"))
    result = run(options)
    assert (result["data"]["split"], result["data"]["n_val"]) == ("split 'val' of the set", 15)
    assert result["baselines"]["pixels"]["metrics"]["top1"]["value"] == 1.0
    with pytest.raises(InputError, match=r"--by vendor: .* has no column 'vendor'"):
        run(options, RetrievalSpec(by="vendor"))
    with pytest.raises(InputError, match=r"--across vendor: .* has no such column"):
        run(options, RetrievalSpec(across="vendor"))
    with pytest.raises(InputError, match="no gnd_rparis6k"):
        run(RetrievalRun(ckpt=str(ckpt), data=f"rparis6k:{tmp_path}"))
