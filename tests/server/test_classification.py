"""A folder with a linear head: what is served is what the evaluator scored, from either form of the network."""

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client

from backbones.heads import HeadManifest, LinearHead, LinearHeadSpec, load_head, save_head
from data.errors import InputError
from evaluators.classification import ClassificationRun
from evaluators.extract import extract
from evaluators.linear import LinearSpec, run
from evaluators.splits import open_splits
from exports.to_onnx import export_onnx
from runtimes.open import open_runtime
from server.artifacts import load_artifacts
from server.run import Running
from tests.evaluators.fakes import colour_folder
from tests.server.conftest import config_of, save_network
from tests.server.images import png
from tests.server.wires import images, open_wire

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module", params=["checkpoint", "onnx"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network and the head that `evaluators.linear` saved, beside each other or in one file; the images in `data`."""
    root = tmp_path_factory.mktemp("network")
    made = save_network(root, seed=3)
    colour_folder(root.parent / f"{root.name}-data", n_val=9, contrast=1)
    options = ClassificationRun(
        ckpt=str(made / "backbone.safetensors"),
        data=str(root.parent / f"{root.name}-data"),
        cache_dir=None,
        threads=1,
        out=root.parent / f"{root.name}-data" / "result.json",
    )
    run(options, LinearSpec(lr=(0.05,), epochs=5), made / "linear.safetensors")
    if request.param == "onnx":
        heads = {"depth_head": made / "depth.safetensors", "linear_head": made / "linear.safetensors"}
        export_onnx(made / "backbone.safetensors", made / "all.onnx", **heads)
    return made


def test_a_served_classifier_guesses_what_the_evaluator_guessed(folder: Path, tmp_path: Path) -> None:
    data = folder.parent / f"{folder.name}-data"
    with open_runtime(folder / "backbone.safetensors", device="cpu") as runtime:
        _, manifest = load_head(folder / "linear.safetensors", runtime.manifest.weights_sha256)
        val = open_splits(data).val
        table = extract(runtime, val)
    assert manifest.classes == CLASSES
    files = [path.read_bytes() for path in sorted((data / "val").glob("*/*"))]
    scored = json.loads((data / "result.json").read_text())["metrics"]["top1"]["value"]
    labels = [path.parent.name for path in sorted((data / "val").glob("*/*"))]
    assert len(files) == len(table)
    with Running(config_of(folder, tmp_path / "state")) as running:
        for wire in ("grpc", "http"):
            opened = open_wire(wire, running.addresses)
            logits = opened.infer("classification", images(*files))["logits"]
            assert (logits.dtype, logits.shape) == (np.float32, (len(files), 3))
            guessed = [CLASSES[index] for index in logits.argmax(axis=1)]
            assert np.mean([a == b for a, b in zip(guessed, labels, strict=True)]) == scored
            opened.close()
        with httpx.Client(base_url=running.addresses.http, timeout=60) as http:
            answer = http.post("/v1/classification?k=2", files={"file": files[0]}).json()
            config = http.get("/v2/models/classification/config").json()
            refused = http.post("/v1/classification?k=0", files={"file": files[0]})
    found = answer["items"][0]["classes"]
    shares = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert [one["label"] for one in found] == [CLASSES[index] for index in np.argsort(-shares)[:2]]
    assert [one["share"] for one in found] == pytest.approx(np.sort(shares)[:0:-1], rel=1e-4)
    assert json.loads(config["parameters"]["classes"]["string_value"]) == list(CLASSES)
    assert refused.status_code == 400


@pytest.mark.parametrize("module", [grpc_client, http_client], ids=["grpc", "http"])
def test_class_count_gives_the_likeliest_classes_as_triton_writes_them(folder: Path, tmp_path: Path, module) -> None:  # type: ignore[no-untyped-def]
    """VALUE:CLASS:NAME, the largest value first; all of them where more are asked for than there are."""
    files = np.array([png(0), png(1)], dtype=object)
    with Running(config_of(folder, tmp_path / "state")) as running:
        address = running.addresses.grpc if module is grpc_client else running.addresses.http.removeprefix("http://")
        with module.InferenceServerClient(address) as client:
            tensor = module.InferInput("image", [2], "BYTES")
            tensor.set_data_from_numpy(files)
            logits = client.infer("classification", [tensor]).as_numpy("logits")
            for k, binary in ((2, True), (9, False)):
                form = {} if module is grpc_client else {"binary_data": binary}
                output = module.InferRequestedOutput("logits", class_count=k, **form)
                found = client.infer("classification", [tensor], outputs=[output]).as_numpy("logits")
                order = np.argsort(-logits, axis=1)[:, :k]
                wanted = [[f"{row[n]:f}:{n}:{CLASSES[n]}" for n in one] for row, one in zip(logits, order, strict=True)]
                told = [[text if isinstance(text, str) else text.decode() for text in row] for row in found]
                assert told == wanted
            assert "classification" in (
                client.get_server_metadata()["extensions"]
                if module is http_client
                else client.get_server_metadata().extensions
            )


def test_a_server_without_a_linear_head_says_so(tmp_path: Path) -> None:
    made = save_network(tmp_path / "network", seed=3)
    with (
        Running(config_of(made, tmp_path / "state")) as running,
        httpx.Client(base_url=running.addresses.http) as http,
    ):
        answer = http.post("/v1/classification", files={"file": png(0)})
    assert answer.status_code == 404
    assert "no linear head is loaded" in answer.json()["error"]


def test_a_head_without_names_for_its_classes_is_refused(tmp_path: Path) -> None:
    made = save_network(tmp_path, seed=3)
    with open_runtime(made / "backbone.safetensors", device="cpu") as runtime:
        fits = runtime.manifest.weights_sha256
    head = LinearHead(LinearHeadSpec(n_classes=3, width_in=48))
    save_head(made / "linear.safetensors", head, HeadManifest(kind="linear", backbone_sha256=fits, spec={}))
    with pytest.raises(InputError, match="names 0 classes and tells 3 apart"):
        load_artifacts(config_of(made, tmp_path / "state"))
