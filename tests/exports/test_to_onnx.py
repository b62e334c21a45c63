"""The command: a whole, checked file or none; what is refused; the exit status."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from data.errors import CheckFailed, InputError, run_cli
from exports import to_onnx
from exports.to_onnx import TOLERANCE, export_onnx, main, relative_difference
from tests.exports.artifacts import Artifact, artifact, save_network

Accident = Callable[[Any, Path], None]


@pytest.fixture
def during_writing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Accident], None]:
    """Makes an accident happen as soon as the file is on the disk under its hidden name."""
    write_file = to_onnx.write_file

    def arrange(accident: Accident) -> None:
        def write(model: Any, path: Path) -> None:
            write_file(model, path)
            accident(model, path)

        monkeypatch.setattr(to_onnx, "write_file", write)

    return arrange


def test_the_file_appears_whole_with_the_folders_it_needs(v1: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "down" / "x.onnx"
    done = export_onnx(v1.ckpt, out, v1.depth_head)
    assert done.parity == v1.parity, "the check draws the same pixels each time"
    assert done.drift is None
    assert out.read_bytes() == v1.onnx.read_bytes()
    assert out.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in out.parent.iterdir()] == ["x.onnx"]


def _tamper(model: onnx.ModelProto, path: Path) -> None:
    """One weight of the last layer is not what it was."""
    altered = onnx.load(path)
    weight = next(one for one in altered.graph.initializer if one.name == "blocks.1.mlp.fc2.weight")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[3, 5] += 0.5
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(altered, path)


def test_a_single_altered_weight_fails_the_check_and_leaves_nothing(
    v1: Artifact, tmp_path: Path, during_writing: Callable
) -> None:
    during_writing(_tamper)
    with pytest.raises(CheckFailed, match=r"differs from torch by .* \(allowed 2e-04\); nothing was written"):
        export_onnx(v1.ckpt, tmp_path / "x.onnx", v1.depth_head)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_with_other_outputs_fails_the_check(v1: Artifact, tmp_path: Path, during_writing: Callable) -> None:
    other = artifact("v2").onnx
    during_writing(lambda _, path: shutil.copy(other, path))
    with pytest.raises(CheckFailed, match=r"the exported graph has outputs .*, wanted .*depth"):
        export_onnx(v1.ckpt, tmp_path / "x.onnx", v1.depth_head)
    assert list(tmp_path.iterdir()) == []


def _interrupt(model: Any, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])
    raise KeyboardInterrupt


def _break(model: Any, path: Path) -> None:
    raise RuntimeError("the exporter failed")


def _disk_full(model: Any, path: Path) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("accident", "error"),
    [(_tamper, CheckFailed), (_interrupt, KeyboardInterrupt), (_break, RuntimeError), (_disk_full, InputError)],
)
def test_an_accident_leaves_nothing(
    v1: Artifact, tmp_path: Path, during_writing: Callable, accident: Accident, error: type[BaseException]
) -> None:
    during_writing(accident)
    with pytest.raises(error):
        export_onnx(v1.ckpt, tmp_path / "x.onnx", v1.depth_head)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_written_over(v1: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "x.onnx"
    out.write_bytes(b"the old one")
    with pytest.raises(InputError, match=r"x\.onnx: is there already; delete it first"):
        export_onnx(v1.ckpt, out)
    assert out.read_bytes() == b"the old one"


def test_what_is_not_a_number_or_of_another_shape_is_no_match() -> None:
    ones = np.ones((2, 3), np.float32)
    broken = ones.copy()
    broken[0, 0] = np.nan
    assert not relative_difference(broken, ones) <= TOLERANCE
    assert not relative_difference(ones, broken) <= TOLERANCE
    assert relative_difference(ones, ones[:1]) == float("inf")
    assert relative_difference(ones * 1.5, ones) == pytest.approx(0.5)
    assert relative_difference(0 * ones, 0 * ones) == 0


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("x.pt", "wanted the name of a file that ends in .onnx"),
        ("x", "wanted the name of a file that ends in .onnx"),
        ("folder.onnx", "wanted the name of a file that ends in .onnx"),
        ("file/x.onnx", "cannot be written"),
        ("file/deep/x.onnx", "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(v1: Artifact, tmp_path: Path, out: str, words: str) -> None:
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("a file")
    with pytest.raises(InputError, match=words):
        export_onnx(v1.ckpt, tmp_path / out, v1.depth_head)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.onnx"]


def test_a_head_of_another_backbone_is_refused(v1: Artifact, tmp_path: Path) -> None:
    _, head = save_network("v1", tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="this head fits the backbone"):
        export_onnx(v1.ckpt, tmp_path / "x.onnx", head)
    assert not (tmp_path / "x.onnx").exists()


# --- the command line -------------------------------------------------------------------------------------------------


def status_of(command: Callable[[], None]) -> int:
    with pytest.raises(SystemExit) as ended:
        run_cli(command)
    return int(ended.value.code or 0)


def test_status_0_with_the_size_and_the_differences(
    v1: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(lambda: main(str(v1.ckpt), tmp_path / "x.onnx", v1.depth_head)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "0.1 MB" in lines[0] or "0.2 MB" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == list(v1.outputs)


def test_status_3_and_one_line_when_the_check_fails(
    v1: Artifact, tmp_path: Path, during_writing: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    during_writing(_tamper)
    assert status_of(lambda: main(str(v1.ckpt), tmp_path / "x.onnx")) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_status_130_when_stopped(v1: Artifact, tmp_path: Path, during_writing: Callable) -> None:
    during_writing(_interrupt)
    assert status_of(lambda: main(str(v1.ckpt), tmp_path / "x.onnx")) == 130
    assert list(tmp_path.iterdir()) == []


def test_status_2_and_one_line_for_bad_input(tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, "-m", "exports.to_onnx", "--ckpt", str(tmp_path / "none.safetensors")]
    ended = subprocess.run(
        [*command, "--out", str(tmp_path / "x.onnx")], cwd=repo_root, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert "no such file" in ended.stderr
    assert list(tmp_path.iterdir()) == []
