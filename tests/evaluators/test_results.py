"""The result file: its fields, its predictions, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from evaluators.results import (
    SCHEMA,
    Context,
    Measurement,
    Metric,
    load_predictions,
    load_result,
    metrics_json,
    result_json,
    result_table,
    save_result,
)

MEASUREMENT = Measurement(
    evaluator="knn",
    protocol="weighted k-NN",
    version=1,
    metrics={"top1": Metric(0.5, (0.4, 0.6), 20), "rmse": Metric(0.3, None, 20, unit="metre")},
    headline="top1",
    selected_on="train",
    chosen={"k": 10},
    grid=[{"k": 10, "top1": np.float64(0.5)}],
    predictions={"names": np.array(["a", "ü"]), "predicted": np.array([1, 0])},
)
CONTEXT = Context(
    model={"ckpt": "x", "runtime": "torch"},
    data={"source": "d", "fingerprint": {}},
    preprocess={},
    timing={},
    environment={},
)
BASELINE = {
    "metrics": metrics_json({"top1": Metric(0.2, (0.1, 0.3), 20)}),
    "difference": {"value": 0.3, "ci95": (0.1, 0.5), "n": 20},
}


def test_a_result_is_written_and_read_back_with_its_predictions(tmp_path: Path) -> None:
    out = tmp_path / "new" / "r.json"
    save_result(out, result_json(MEASUREMENT, CONTEXT, {"pixels": BASELINE}), MEASUREMENT.predictions)
    result = load_result(out)
    assert result["schema"] == SCHEMA
    assert result["metrics"]["top1"] == {"value": 0.5, "ci95": [0.4, 0.6], "n": 20}
    assert result["metrics"]["rmse"]["unit"] == "metre"
    with np.load(out.parent / result["predictions_file"], allow_pickle=False) as arrays:
        assert arrays["names"].tolist() == ["a", "ü"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["r.json", "r.predictions.npz"]


def test_a_result_that_stopped_half_way_leaves_none_that_mixes_old_and_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.json"
    save_result(out, result_json(MEASUREMENT, CONTEXT), MEASUREMENT.predictions)
    assert load_predictions(out, load_result(out)).keys() == MEASUREMENT.predictions.keys()
    newer = {name: values[::-1] for name, values in MEASUREMENT.predictions.items()}
    with monkeypatch.context() as patched:
        patched.setattr("json.dumps", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save_result(out, result_json(MEASUREMENT, CONTEXT), newer)
    with pytest.raises(
        InputError, match=r"r\.predictions\.npz: its predictions are not those of r\.json; run the evaluator"
    ):
        load_predictions(out, load_result(out))


def test_a_result_holding_nan_or_an_object_is_never_half_written(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    bad = replace(MEASUREMENT, metrics={"top1": Metric(float("nan"), None, 1)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_result(out, result_json(bad, CONTEXT), {})
    with pytest.raises(ValueError, match="allow_pickle"):
        save_result(out, result_json(MEASUREMENT, CONTEXT), {"names": np.array([{}], dtype=object)})
    assert list(tmp_path.iterdir()) == []


def test_another_schema_and_no_json_are_refused_by_name(tmp_path: Path) -> None:
    for text, message in (('{"schema": "other/3"}', "other/3"), ("[]", "list"), ("{", "no readable result")):
        path = tmp_path / "r.json"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            load_result(path)


def test_an_out_that_is_no_json_or_no_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.json"):
        save_result(tmp_path / "r.txt", {}, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write there"):
        save_result(tmp_path / "file" / "r.json", {}, {})


def test_the_table_shows_figures_intervals_baselines_and_the_paired_difference() -> None:
    text = result_table(json.loads(json.dumps(result_json(MEASUREMENT, CONTEXT, {"pixels": BASELINE}), default=float)))
    assert "top1*" in text
    assert "0.4000 .. 0.6000" in text
    assert "0.3000 metre" in text
    assert "top1 minus pixels: 0.3000 (95 % 0.1000 .. 0.5000, paired)" in text
    assert "k=10 on train" in text
