"""Evaluators on maps and videos find on a running server, and on an exported file, what they find on the checkpoint."""

import pytest

from data.errors import InputError
from evaluators import attention, depth, segmentation, video_objects
from tests.evaluators.test_attention import blob_folder
from tests.evaluators.test_depth import rooms_folder
from tests.evaluators.test_segmentation import parts_folder
from tests.evaluators.test_video_objects import clip_folder


def figures(evaluator: str, ckpt: object, data: object) -> dict[str, float]:
    """The metrics of a quick run."""
    common = {"ckpt": str(ckpt), "data": str(data), "cache_dir": None, "device": "cpu", "threads": 1}
    if evaluator == "attention":
        result = attention.run(attention.AttentionRun(**common), attention.AttentionSpec(size=32))
    elif evaluator == "video_objects":
        spec = video_objects.VideoObjectsSpec(size=64)
        result = video_objects.run(video_objects.VideoObjectsRun(**common), spec)
    elif evaluator == "segmentation":
        spec = segmentation.SegmentationSpec(lr=(3e-2,), steps=20, size=32)
        result = segmentation.run(segmentation.SegmentationRun(**common), spec)
    else:
        result = depth.run(depth.DepthRun(**common), depth.DepthSpec(lr=(1e-2,), steps=20, size=32))
    return {name: metric["value"] for name, metric in result["metrics"].items()}


@pytest.mark.parametrize(
    ("evaluator", "make"),
    [
        ("attention", blob_folder),
        ("video_objects", clip_folder),
        ("segmentation", parts_folder),
        ("depth", rooms_folder),
    ],
)
def test_figures_on_a_server_and_on_an_exported_file_are_those_of_the_checkpoint(
    server, network, onnx_file, tmp_path, evaluator, make
):
    data = make(tmp_path / "data")
    wanted = figures(evaluator, network / "backbone.safetensors", data)
    for ckpt in (f"grpc://{server.addresses.grpc}", onnx_file):
        found = figures(evaluator, ckpt, data)
        assert found == pytest.approx(wanted, abs=5e-3), str(ckpt)


def test_four_layers_are_refused_on_a_server(server, tmp_path):
    data = parts_folder(tmp_path / "data")
    options = segmentation.SegmentationRun(
        ckpt=f"grpc://{server.addresses.grpc}", data=str(data), cache_dir=None, threads=1
    )
    with pytest.raises(InputError, match=r"blocks|exported files and servers"):
        segmentation.run(options, segmentation.SegmentationSpec(lr=(3e-2,), steps=5, layers="last4"))
