"""A folder with a segmentation head: what is served is what the head says of the whole image, from either form of the network."""

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from backbones.checkpoints import load_backbone
from backbones.heads import HeadManifest, SegmentationHead, SegmentationHeadSpec, save_head
from data.decode import decode_image
from data.preprocess import whole_view
from exports.to_onnx import export_onnx
from runtimes.open import open_runtime
from server.run import Running
from tests.server.conftest import PREPROCESS, config_of, save_network
from tests.server.images import jpeg, png
from tests.server.wires import images, open_wire

FILES = (png(0), jpeg(1, 120, 60))
CLASSES = ("sky", "grass", "cow")


@pytest.fixture(scope="module", params=["checkpoint", "onnx"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network and its heads, as files beside each other or in one."""
    made = save_network(tmp_path_factory.mktemp("network"), seed=3)
    torch.manual_seed(3)
    head = SegmentationHead(SegmentationHeadSpec(n_classes=3, width_in=96, layers=(0, 1)))
    fits = load_backbone(made / "backbone.safetensors").manifest.weights_sha256
    manifest = HeadManifest(kind="segmentation", backbone_sha256=fits, spec={}, classes=CLASSES)
    save_head(made / "segmentation.safetensors", head, manifest)
    if request.param == "onnx":
        heads = made / "depth.safetensors", made / "segmentation.safetensors"
        export_onnx(made / "backbone.safetensors", made / "all.onnx", heads[0], segmentation_head=heads[1])
    return made


def test_classes_are_the_heads_on_every_wire_and_for_people(folder: Path, tmp_path: Path) -> None:
    with open_runtime(
        folder / "backbone.safetensors",
        device="cpu",
        depth_head=folder / "depth.safetensors",
        segmentation_head=folder / "segmentation.safetensors",
    ) as runtime:
        wanted = {
            size: runtime.run(
                np.stack([whole_view(decode_image(file), PREPROCESS, size) for file in FILES]), ("classes",)
            )["classes"]
            for size in (48, 64)
        }
    assert len(np.unique(wanted[48])) == 3
    with Running(config_of(folder, tmp_path / "state")) as running:
        for wire in ("grpc", "http"):
            opened = open_wire(wire, running.addresses)
            for size, parameters in ((48, {}), (64, {"size": 64})):
                found = opened.infer("segmentation", images(*FILES), parameters=parameters)["classes"]
                assert found.dtype == np.int32
                assert found.shape == (2, size, size)
                assert (found != wanted[size]).mean() < 2e-3
            opened.close()
        with httpx.Client(base_url=running.addresses.http, timeout=60) as http:
            answer = http.post("/v1/segmentation", files={"file": FILES[0]}).json()
            config = http.get("/v2/models/segmentation/config").json()
        assert answer["classes"] == list(CLASSES)
        assert (np.array(answer["items"][0]["classes"]) != wanted[48][0]).mean() < 2e-3
        assert json.loads(config["parameters"]["classes"]["string_value"]) == list(CLASSES)
