"""`--models`: one file, a folder whose files fit together, a Triton repository; anything else is told apart."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from backbones.checkpoints import MANIFEST_KEY
from backbones.heads import HeadManifest, LinearHead, LinearHeadSpec, save_head
from data.errors import InputError
from runtimes.onnx_runtime import HEADS_KEY
from server.artifacts import load_artifacts
from tests.server.conftest import config_of

PIXELS = np.random.default_rng(0).standard_normal((2, 3, 32, 40), dtype=np.float32)


@pytest.fixture
def folder(network, tmp_path):
    """A copy of the network's folder that a test may change."""
    return shutil.copytree(network, tmp_path / "models")


def load(path, tmp_path, **changes):
    return load_artifacts(config_of(path, tmp_path / "state", **changes))


def refused(path, tmp_path):
    with pytest.raises(InputError) as caught:
        load(path, tmp_path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def without_depth(onnx_file, path):
    """The same backbone, exported without its depth head."""
    model = onnx.load(str(onnx_file))
    kept = [output for output in model.graph.output if output.name != "depth"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    metadata = {one.key: one.value for one in model.metadata_props if one.key != HEADS_KEY}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, str(path))
    return path


def test_a_checkpoint_alone_is_served_without_depth(network, tmp_path):
    loaded = load(network / "backbone.safetensors", tmp_path)
    assert [one.name for one in loaded.runtimes] == ["torch"]
    assert (loaded.runtimes[0].outputs, loaded.version) == (("embedding", "patches", "attention"), "1")
    assert loaded.depth_unit is None


def test_what_may_not_be_read_is_refused_in_a_line(folder, tmp_path, monkeypatch):
    """As on a machine where the server has a user of its own; and a name that no file can have."""

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    assert f"{folder} cannot be read (Permission denied)" in refused(folder, tmp_path)
    assert "cannot be read (File name too long)" in refused(tmp_path / ("x" * 300), tmp_path)


def test_a_folder_with_a_checkpoint_alone_is_served_without_depth(folder, tmp_path):
    (folder / "depth.safetensors").unlink()
    loaded = load(folder, tmp_path)
    assert [one.name for one in loaded.runtimes] == ["torch"]
    assert "depth" not in loaded.runtimes[0].outputs


def test_an_onnx_alone_is_served_with_all_it_has(onnx_file, runtime, tmp_path):
    loaded = load(onnx_file, tmp_path)
    assert loaded.runtimes[0].name == "onnxruntime"
    assert loaded.depth_unit == "furlong"
    wanted = runtime.run(PIXELS, runtime.outputs)
    for name, array in loaded.runtimes[0].run(PIXELS, runtime.outputs).items():
        np.testing.assert_allclose(array, wanted[name], atol=1e-4)


def test_a_folder_joins_a_backbone_with_its_head(folder, runtime, tmp_path):
    loaded = load(folder, tmp_path)
    assert (loaded.runtimes[0].name, loaded.depth_unit) == ("torch", "furlong")
    np.testing.assert_array_equal(
        loaded.runtimes[0].run(PIXELS, ("depth",))["depth"], runtime.run(PIXELS, ("depth",))["depth"]
    )


def test_other_files_in_the_folder_do_not_matter(folder, tmp_path):
    (folder / "README.md").write_text("about these")
    (folder / ".backbone.safetensors").write_text("half written")
    (folder / "linear").mkdir()
    assert load(folder, tmp_path).runtimes[0].name == "torch"


def test_heads_of_several_kinds_lie_beside_it(folder, runtime, tmp_path):
    fits = runtime.manifest.weights_sha256
    manifest = HeadManifest(kind="linear", backbone_sha256=fits, spec={}, features="cls", classes=("cat", "dog"))
    save_head(folder / "linear.safetensors", LinearHead(LinearHeadSpec(n_classes=2, width_in=48)), manifest)
    loaded = load(folder, tmp_path)
    assert (loaded.depth_unit, loaded.labels) == ("furlong", ("cat", "dog"))
    assert {"depth", "logits"} <= set(loaded.runtimes[0].outputs)


def test_of_both_forms_the_exported_one_is_taken(folder, onnx_file, tmp_path):
    shutil.copy(onnx_file, folder / "z.onnx")
    loaded = load(folder, tmp_path)
    assert (loaded.runtimes[0].name, loaded.depth_unit) == ("onnxruntime", "furlong")


def test_but_not_where_it_lacks_an_output(folder, onnx_file, tmp_path):
    without_depth(onnx_file, folder / "backbone.onnx")
    assert load(folder, tmp_path).runtimes[0].name == "torch"
    (folder / "depth.safetensors").unlink()
    assert load(folder, tmp_path).runtimes[0].name == "onnxruntime"


def test_nor_where_its_depth_is_of_another_head(folder, onnx_file, tmp_path):
    model = onnx.load(str(onnx_file))
    entry = next(one for one in model.metadata_props if one.key == HEADS_KEY)
    heads = json.loads(entry.value)
    heads["depth"]["weights_sha256"] = "0" * 64
    entry.value = json.dumps(heads)
    onnx.save(model, str(folder / "backbone.onnx"))
    assert load(folder, tmp_path).runtimes[0].name == "torch"


def test_a_head_that_an_exported_file_lacks_is_an_error(folder, onnx_file, tmp_path):
    without_depth(onnx_file, folder / "backbone.onnx")
    (folder / "backbone.safetensors").unlink()
    line = refused(folder, tmp_path)
    assert "backbone.onnx was exported without the depth head depth.safetensors" in line


def test_of_a_triton_repository_the_highest_version_is_taken(onnx_file, tmp_path):
    repository = tmp_path / "repository"
    for version in ("2", "10", "9"):
        (repository / "backbone" / version).mkdir(parents=True)
        target = repository / "backbone" / version / "model.onnx"
        shutil.copy(onnx_file, target) if version == "10" else target.write_bytes(b"older")
    loaded = load(repository, tmp_path)
    assert (loaded.version, loaded.runtimes[0].name) == ("10", "onnxruntime")


@pytest.mark.parametrize(("form", "threads", "objects"), [("torch", 1, 3), ("onnx", 2, 3), ("onnx", 1, 1)])
def test_instances_are_copies_that_answer_alike(folder, onnx_file, tmp_path, form, threads, objects):
    """One session that computes in its caller's thread stands for all of them, and so do its weights."""
    loaded = load(onnx_file if form == "onnx" else folder, tmp_path, instances=3, threads=threads)
    assert (len(loaded.runtimes), len(set(map(id, loaded.runtimes)))) == (3, objects)
    assert [one.threads for one in loaded.runtimes] == [threads] * 3
    first, *others = (one.run(PIXELS)["embedding"] for one in loaded.runtimes)
    assert all(np.array_equal(first, other) for other in others)


def test_a_head_of_another_backbone_is_an_error_that_names_both(folder, other_network, tmp_path):
    shutil.copy(other_network / "depth.safetensors", folder / "depth.safetensors")
    line = refused(folder, tmp_path)
    assert "depth.safetensors fits the backbone" in line
    assert "backbone.safetensors is" in line


def test_two_backbones_are_an_error_that_names_both(folder, other_network, tmp_path):
    shutil.copy(other_network / "backbone.safetensors", folder / "second.safetensors")
    assert "backbone.safetensors and second.safetensors are different backbones" in refused(folder, tmp_path)


def test_two_depth_heads_are_an_error_that_names_both(folder, tmp_path):
    shutil.copy(folder / "depth.safetensors", folder / "depth2.safetensors")
    assert "depth.safetensors and depth2.safetensors are both depth heads" in refused(folder, tmp_path)


def test_two_models_of_a_repository_are_an_error_that_names_both(onnx_file, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "repository" / name / "1").mkdir(parents=True)
        shutil.copy(onnx_file, tmp_path / "repository" / name / "1" / "model.onnx")
    assert "one and two both have a model.onnx" in refused(tmp_path / "repository", tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no backbone" in refused(tmp_path / "empty", tmp_path)


def test_a_missing_path_is_an_error(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "missing", tmp_path)


def test_heads_without_a_backbone_are_an_error(folder, tmp_path):
    (folder / "backbone.safetensors").unlink()
    assert "holds heads (depth.safetensors) and no backbone" in refused(folder, tmp_path)


@pytest.mark.parametrize("name", ["backbone.safetensors", "backbone.onnx"])
def test_a_file_cut_short_is_an_error(folder, onnx_file, tmp_path, name):
    whole = onnx_file if name.endswith("onnx") else folder / name
    (folder / name).write_bytes(whole.read_bytes()[:3000])
    refused(folder / name, tmp_path)
    assert name in refused(folder, tmp_path)


@pytest.mark.parametrize("manifest", ["[]", '"x"', "null", "{", '{"kind": []}', "[" * 100_000])
def test_a_manifest_that_is_none_is_an_error(folder, tmp_path, manifest):
    save_file({"w": np.zeros(1, np.float32)}, str(folder / "other.safetensors"), {MANIFEST_KEY: manifest})
    with pytest.raises(InputError, match=r"other\.safetensors: (its manifest is|has no manifest)"):
        load(folder, tmp_path)


@pytest.mark.parametrize("heads", ["[]", '{"depth": 3}', '{"depth": {"spec": []}}'])
def test_heads_that_are_none_are_an_error(onnx_file, tmp_path, heads):
    model = onnx.load(str(onnx_file))
    next(one for one in model.metadata_props if one.key == HEADS_KEY).value = heads
    onnx.save(model, str(tmp_path / "odd.onnx"))
    assert "export it again" in refused(tmp_path / "odd.onnx", tmp_path)


def test_a_head_alone_is_an_error(folder, tmp_path):
    assert "not a backbone" in refused(folder / "depth.safetensors", tmp_path)


def test_a_stranger_in_the_folder_is_an_error(folder, tmp_path):
    import safetensors.numpy

    safetensors.numpy.save_file({"x": np.zeros(1, np.float32)}, folder / "x.safetensors")
    assert "x.safetensors: has no manifest of ours" in refused(folder, tmp_path)


@pytest.mark.parametrize("form", ["checkpoint", "onnx"])
def test_several_devices_hold_a_copy_each_and_share_the_work(network, onnx_file, tmp_path, runtime, form):
    """Two CPUs stand in for two GPUs."""
    config = config_of(network if form == "checkpoint" else onnx_file, tmp_path, device="cpu,cpu", instances=2)
    loaded = load_artifacts(config)
    assert [one.device for one in loaded.runtimes] == ["cpu"] * 4
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    wanted = runtime.run(pixels)["embedding"]
    for one in loaded.runtimes:
        np.testing.assert_allclose(one.run(pixels)["embedding"], wanted, atol=1e-5)
    for one in loaded.runtimes:
        one.close()


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cpu,tpu", "'tpu' is unknown"),
        ("cuda:0,cuda:1", "--device cuda:0: "),
        ("cuda:", "'cuda:' is unknown"),
        ("cpu,", "'' is unknown"),
    ],
)
def test_a_device_that_is_not_there_ends_the_start_and_is_named(
    network, onnx_file, tmp_path, device, words, monkeypatch
):
    """No silent fall to the CPU, on either engine."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for models in (network, onnx_file):
        with pytest.raises(InputError, match=words):
            load_artifacts(config_of(models, tmp_path, device=device))
