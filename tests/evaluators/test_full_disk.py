"""A disk that is full once the work is done: one line for each kind of file that evaluators write, and nothing half written."""

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from backbones.heads import HeadManifest, LinearHead, LinearHeadSpec, save_head
from data.errors import InputError
from evaluators import compare, parity
from evaluators.picture_sheet import save_sheet
from tests.evaluators.fakes import colour_folder, small_checkpoint
from tests.evaluators.test_compare import make_result


def head(out: Path) -> None:
    save_head(
        out,
        LinearHead(LinearHeadSpec(n_classes=2, width_in=3)),
        HeadManifest(kind="linear", backbone_sha256="0" * 64, spec={}),
    )


def picture(out: Path) -> None:
    save_sheet(out, [("a row", [np.zeros((8, 8, 3), np.uint8)])])


def comparison(out: Path) -> None:
    inputs = out.parent.parent
    compare.main(inputs / "a.json", inputs / "b.json", out)


def parity_report(out: Path) -> None:
    inputs = out.parent.parent
    options = parity.ParityRun(data=str(inputs / "data"), out=out, threads=1, device="cpu")
    parity.run(*[str(inputs / "a.safetensors")] * 2, options, parity.ParitySpec(evaluators=()))


@pytest.mark.parametrize(
    ("write", "name"),
    [(head, "h.safetensors"), (picture, "p.png"), (comparison, "c.json"), (parity_report, "q.json")],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    write: Callable[[Path], None], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    for result in ("a.json", "b.json"):
        make_result(tmp_path / result, np.ones(4))
    small_checkpoint(tmp_path / "a.safetensors")
    colour_folder(tmp_path / "data", n_train=1, n_val=1)
    (tmp_path / "full").mkdir()

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(InputError, match=r"\(No space left on device\); name another place"):
        write(tmp_path / "full" / name)
    assert list((tmp_path / "full").iterdir()) == []
