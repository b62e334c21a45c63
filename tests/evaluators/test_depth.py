"""The depth probe: the head it trains is the one that is served, its choice is blind to the test, its floor is known."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from backbones.checkpoints import CheckpointError, Manifest, save_backbone
from backbones.heads import DepthHead, DepthHeadSpec, DptDepthHead, load_head
from backbones.vit import ViT, ViTSpec
from data.errors import InputError
from evaluators.depth import DepthRun, evaluate, fit, run
from evaluators.depth_dpt import fold_scaling_, gradient_loss
from evaluators.depth_metrics import image_metrics
from evaluators.depth_probe import DepthTable, Scaling, TrainSpec, depth_at, predict_depth, sig_loss, train_head
from evaluators.depth_protocol import DepthSpec
from evaluators.depth_scores import aligned, evaluate_mean, mean_map
from evaluators.layers import with_layers
from evaluators.results import load_result
from evaluators.splits import FOLDS, hash_bucket
from runtimes.open import open_runtime
from runtimes.torch_runtime import TorchRuntime
from tests.evaluators.fakes import SMALL, MeanColourRuntime, small_checkpoint

QUICK = DepthSpec(lr=(1e-3, 3e-2), steps=60, batch=8)
GRID = 4


def brightness_table(n: int, seed: int) -> DepthTable:
    """Patches whose first channel tells the depth at their place, beside a channel of noise on another scale."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(1, 6, (n, GRID, GRID)).astype(np.float32)
    signal = coarse.reshape(n, -1, 1)
    patches = np.concatenate([signal, 50 + 9 * rng.normal(size=signal.shape)], axis=2).astype(np.float32)
    names = tuple(f"room{seed}-{i}" for i in range(n))
    depth = [cv2.resize(one, (24, 20), interpolation=cv2.INTER_LINEAR) for one in coarse]
    return DepthTable(names, names, patches, patches.mean(axis=1), depth)


def rooms_folder(root: Path, n_train: int = 20, n_val: int = 6) -> Path:
    """images/SPLIT/*.png with depth_mm/SPLIT/*.png: the brighter a quarter, the nearer; a hole in each map."""
    rng = np.random.default_rng(0)
    for split, count in (("train", n_train), ("val", n_val)):
        for i in range(count):
            depth = np.kron(rng.uniform(1000, 5000, (2, 2)), np.ones((16, 24)))
            image = np.repeat((255 - depth / 5000 * 200)[:, :, None], 3, axis=2)
            depth[:4, :4] = 0
            for kind, array in (("images", image.astype(np.uint8)), ("depth_mm", depth.astype(np.uint16))):
                path = root / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), array)
    return root


def test_the_head_at_drawn_places_is_the_head_on_its_enlarged_map() -> None:
    generator = torch.Generator().manual_seed(0)
    h, w = 3, 5
    head = DepthHead(DepthHeadSpec(width_in=8, bins=16))
    patches = torch.randn(2, h * w, 4, generator=generator)
    cls = torch.randn(2, 4, generator=generator)
    places = torch.arange(4 * h * 4 * w).repeat(2, 1)
    whole = head(patches, cls, (h, w), (4 * h, 4 * w))
    torch.testing.assert_close(depth_at(head, patches, cls, (h, w), places).reshape(2, 4 * h, 4 * w), whole)


def test_the_loss_is_that_of_the_log_ratio_over_measured_pixels() -> None:
    measured = torch.tensor([[1.0, 2.0, 0.0, 4.0]])
    predicted = torch.tensor([[1.5, 2.0, 9.0, 3.0]])
    ratio = torch.log((torch.tensor([1.5, 2.0, 3.0]) + 1e-3) / (torch.tensor([1.0, 2.0, 4.0]) + 1e-3))
    assert sig_loss(predicted, measured) == pytest.approx(float(torch.sqrt(ratio.var() + 0.15 * ratio.mean() ** 2)))
    assert sig_loss(predicted, torch.zeros(1, 4)) == 0


def test_scaling_is_folded_into_the_head_so_that_it_takes_features_as_they_come() -> None:
    table = brightness_table(6, 0)
    scaling = Scaling.of(table, np.arange(6))
    head = DepthHead(DepthHeadSpec(width_in=4))
    patches, cls = scaling.scaled(table, np.arange(6))
    assert patches.mean(dim=(0, 1)).abs().max() < 1e-4
    torch.testing.assert_close(patches.std(dim=(0, 1), correction=0), torch.ones(2), atol=1e-4, rtol=0)
    raw = torch.from_numpy(table.patches_nND), torch.from_numpy(table.cls_nD)
    torch.testing.assert_close(
        scaling.folded(head)(*raw, table.grid, (8, 8)), head(patches, cls, table.grid, (8, 8)), atol=1e-4, rtol=1e-4
    )


def test_a_probe_learns_what_is_in_the_patches_and_beats_the_mean_map() -> None:
    train, test = brightness_table(60, 0), brightness_table(20, 1)
    spec = DepthSpec(lr=(1e-2,), steps=150)
    probe, head = evaluate(train, test, spec)
    floor = evaluate_mean(train, test, spec)
    assert probe.metrics["abs_rel"].value < 0.6 * floor.metrics["abs_rel"].value
    wanted = np.mean([image_metrics(predict_depth(head, test, i), test.depth_m[i])["rmse"] for i in range(20)])  # type: ignore[index]
    assert probe.metrics["rmse"].value == pytest.approx(wanted)
    low, high = probe.metrics["abs_rel"].ci95 or (0.0, 0.0)
    assert low < probe.metrics["abs_rel"].value < high


def test_training_repeats_under_a_seed() -> None:
    table, rows = brightness_table(10, 0), np.arange(10)

    def weights(seed: int) -> torch.Tensor:
        spec = TrainSpec(lr=1e-2, weight_decay=0.01, steps=5, batch=4, seed=seed)
        return train_head(table, rows, DepthHeadSpec(width_in=4), spec).linear.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_the_learning_rate_is_chosen_without_the_test_and_scenes_are_held_out_whole() -> None:
    train, test = brightness_table(40, 0), brightness_table(10, 1)
    found, _ = evaluate(train, test, QUICK)
    assert found.selected_on == "train, 1 held-out fifth of the scenes"
    assert found.chosen == {"lr": min(found.grid, key=lambda e: e["train_held_out_abs_rel"])["lr"]}
    upside_down = DepthTable(test.names, test.groups, test.patches_nND, test.cls_nD, [7 - d for d in test.depth_m])
    again, _ = evaluate(train, upside_down, QUICK)
    assert (again.chosen, again.grid) == (found.chosen, found.grid)
    names = [next(f"{g}-{i}" for i in range(99) if hash_bucket(f"fold/{g}-{i}", FOLDS) == g * 4) for g in (0, 1)]
    two_scenes = DepthTable(train.names, tuple(names) * 20, train.patches_nND, train.cls_nD, train.depth_m)
    spec = DepthSpec(lr=(1e-2,), steps=2, batch=8, held_out=4)
    assert evaluate(two_scenes, test, spec)[0].selected_on == "train, 2 held-out fifths in turn of the scenes"
    one_scene = DepthTable(train.names, ("a",) * 40, train.patches_nND, train.cls_nD, train.depth_m)
    with pytest.raises(InputError, match="cannot be cut into parts"):
        evaluate(one_scene, test, QUICK)


def test_the_mean_map_is_the_geometric_mean_of_what_was_measured_at_each_place() -> None:
    maps = [np.full((8, 8), 2.0, np.float32), np.full((4, 4), 8.0, np.float32)]
    maps[1][0, 0] = 0
    maps.append(np.full((8, 8), 50.0, np.float32))  # beyond the range
    table = DepthTable(("a", "b", "c"), ("a", "b", "c"), np.zeros((3, 4, 1)), np.zeros((3, 1)), maps)
    mean = mean_map(table, DepthSpec(), side=8)
    assert mean[0, 0] == pytest.approx(2.0)
    assert mean[5, 5] == pytest.approx(4.0)


def test_measurements_beyond_the_range_do_not_count_and_are_told() -> None:
    train, test = brightness_table(30, 0), brightness_table(5, 1)
    test.depth_m[0][:2] = 40.0  # type: ignore[call-overload]
    test.depth_m[1][:] = 0  # type: ignore[call-overload]
    found = evaluate_mean(train, test, DepthSpec())
    assert found.metrics["abs_rel"].n == 4
    assert found.notes == [
        "1 test images have no measurement and were left out",
        "48 measured test pixels lie beyond 10 m and do not count; see --max-depth",
    ]
    with pytest.raises(InputError, match=r"no training image has a depth from 0\.001 to 0\.5 metres.*--max-depth"):
        evaluate(train, test, DepthSpec(max_depth=0.5))


def test_the_command_writes_result_picture_and_a_head_that_serves_the_same_depth(tmp_path: Path) -> None:
    data, ckpt = rooms_folder(tmp_path / "data"), small_checkpoint(tmp_path / "a.safetensors")
    out, head_path = tmp_path / "results" / "depth.json", tmp_path / "models" / "depth.safetensors"
    options = DepthRun(
        ckpt=str(ckpt), data=str(data), out=out, cache_dir=tmp_path / "cache", threads=1, baselines=("mean", "colour")
    )
    result = run(options, QUICK, head_path)
    written = load_result(out)
    assert written["metrics"]["abs_rel"]["value"] == result["metrics"]["abs_rel"]["value"]
    assert written["metrics"]["rmse"]["unit"] == "m"
    assert written["metrics"]["abs_rel"]["lower_is_better"] is True
    assert {"abs_rel", "rmse", "mae", "delta1", "delta2", "delta3", "rmse_log", "log10", "silog"} <= set(
        written["metrics"]
    )
    assert set(written["baselines"]) == {"mean", "colour"}
    with np.load(tmp_path / "results" / written["predictions_file"]) as predictions:
        per_image = predictions["abs_rel"]
    assert per_image.mean() == pytest.approx(written["metrics"]["abs_rel"]["value"])
    picture = cv2.imread(str(tmp_path / "results" / written["picture_file"]))
    assert picture is not None
    assert picture.shape[0] > 6 * 192

    with open_runtime(ckpt, depth_head=head_path) as runtime:
        assert isinstance(runtime, TorchRuntime)
        head, manifest = load_head(head_path, runtime.manifest.weights_sha256)
        assert manifest.kind == "depth"
        assert manifest.metrics["abs_rel"]["value"] == written["metrics"]["abs_rel"]["value"]
        assert isinstance(head, DepthHead)
        assert head.spec.unit == "metre"
        served = runtime.run(np.zeros((1, 3, 32, 32), np.float32), ("depth",))["depth"]
        assert served.shape == (1, 32, 32)
        assert served.min() > 0
        assert served.max() <= 10
    with pytest.raises(CheckpointError, match="fits the backbone"):
        open_runtime(small_checkpoint(tmp_path / "b.safetensors", seed=1), depth_head=head_path)

    again = run(options, QUICK)
    assert again["timing"]["features_from_cache"]
    assert again["metrics"] == result["metrics"]
    depth_map = next(iter(sorted((data / "depth_mm").rglob("*.png"))))
    cv2.imwrite(str(depth_map), cv2.imread(str(depth_map), cv2.IMREAD_UNCHANGED) + 1)
    other = run(options, QUICK)["data"]
    assert other["fingerprint"] == result["data"]["fingerprint"]
    assert other["truth_fingerprint"] != result["data"]["truth_fingerprint"]


def test_a_corrupt_image_is_left_out_with_its_own_depth_map(tmp_path: Path) -> None:
    data, ckpt = rooms_folder(tmp_path / "data", n_val=30), small_checkpoint(tmp_path / "a.safetensors")
    out = tmp_path / "depth.json"
    options = DepthRun(ckpt=str(ckpt), data=str(data), cache_dir=None, threads=1, out=out)
    quick = DepthSpec(lr=(1e-2,), steps=5)
    run(options, quick)
    with np.load(tmp_path / "depth.predictions.npz") as file:
        before = dict(zip(file["names"].tolist(), file["abs_rel"].tolist(), strict=True))
    (data / "images" / "val" / "3.png").write_bytes(b"no image")
    result = run(options, quick)
    with np.load(tmp_path / "depth.predictions.npz") as file:
        after = dict(zip(file["names"].tolist(), file["abs_rel"].tolist(), strict=True))
    assert list(result["data"]["skipped"]) == ["val/3.png"]
    assert before.pop("val/3.png") > 0
    assert after == pytest.approx(before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr": (-1.0,)}, "--lr"),
        ({"lr": (math.nan,)}, "--lr"),
        ({"steps": 0}, "--steps"),
        ({"held_out": 0}, "--held-out 0"),
        ({"max_depth": 0.0}, "--max-depth"),
    ],
)
def test_impossible_settings_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DepthSpec(**flags)


def layered_table(n: int, seed: int) -> DepthTable:
    """Four layers of eight channels each: the depth is in the third layer's first one."""
    plain = brightness_table(n, seed)
    rng = np.random.default_rng(seed + 100)
    patches = rng.normal(size=(n, GRID * GRID, 32)).astype(np.float32) * 3 + 5
    patches[:, :, 16] = plain.patches_nND[:, :, 0]
    return DepthTable(plain.names, plain.groups, patches, patches.mean(axis=1), plain.depth_m)


@pytest.mark.parametrize("head", ["linear4", "dpt"])
def test_heads_on_four_layers_learn_what_is_in_one_of_them(head: str) -> None:
    train, test = layered_table(80, 0), layered_table(10, 1)
    lr, steps = (1e-2, 150) if head == "linear4" else (3e-3, 120)
    spec = DepthSpec(head=head, lr=(lr,), steps=steps, batch=8, dpt_channels=8)  # type: ignore[arg-type]
    trained = fit(train, np.arange(80), spec.head_spec(64, (0, 1, 2, 3)), spec.training(lr, 0))
    assert isinstance(trained, DptDepthHead) == (head == "dpt")
    errors = [image_metrics(predict_depth(trained, test, i), test.depth_m[i])["abs_rel"] for i in range(10)]  # type: ignore[index]
    assert np.mean(errors) < 0.8 * evaluate_mean(train, test, spec).metrics["abs_rel"].value


def test_the_dpt_heads_scaling_is_folded_into_its_first_layers() -> None:
    table = layered_table(6, 0)
    scaling = Scaling.of(table, np.arange(6))
    torch.manual_seed(0)
    head = DptDepthHead(DepthHeadSpec(width_in=64, layers=(0, 1, 2, 3), decoder="dpt", channels=4))
    head.decoder.last.bias.data.fill_(3.0)
    patches, cls = scaling.scaled(table, np.arange(6))
    wanted = head(patches, cls, table.grid, (8, 8))
    raw = torch.from_numpy(table.patches_nND), torch.from_numpy(table.cls_nD)
    torch.testing.assert_close(fold_scaling_(head, scaling)(*raw, table.grid, (8, 8)), wanted, atol=1e-4, rtol=1e-4)


def test_the_gradient_loss_sees_edges_and_not_the_overall_scale() -> None:
    measured = torch.rand(2, 8, 8) * 4 + 1
    assert gradient_loss(measured, measured) == 0
    assert gradient_loss(measured * 1.5, measured) < 2e-3
    assert gradient_loss(measured.roll(1, 2), measured) > 0.1
    assert gradient_loss(measured.roll(1, 2), torch.zeros(2, 8, 8)) == 0
    ramp = torch.exp(torch.arange(8.0) / 8).repeat(8, 1)[None]  # changes to the right alone, by an eighth a place
    found = gradient_loss(ramp, torch.ones(1, 8, 8))
    assert found == pytest.approx(np.mean([step / 8 for step in (1, 2, 4, 6)]), abs=1e-3)


def test_alignment_brings_a_map_of_another_scale_and_shift_home() -> None:
    measured = np.random.default_rng(0).uniform(1, 5, (8, 8)).astype(np.float32)
    np.testing.assert_allclose(aligned(measured * 0.3 + 2, measured), measured, atol=1e-4)
    upside_down = aligned(-measured, measured)
    np.testing.assert_allclose(upside_down, measured.mean(), atol=1e-4)
    measured[0] = 0
    assert aligned(np.full((8, 8), 3.0), measured)[4, 4] == pytest.approx(measured[1:].mean())


def test_a_mirrored_view_is_averaged_in() -> None:
    table = brightness_table(3, 0)
    head = DepthHead(DepthHeadSpec(width_in=4, bins=8))
    other = (table.patches_nND[::-1].copy(), table.cls_nD[::-1].copy())
    both = DepthTable(table.names, table.groups, table.patches_nND, table.cls_nD, table.depth_m, other)
    swapped = DepthTable(table.names, table.groups, *other, table.depth_m)
    wanted = (predict_depth(head, table, 0) + predict_depth(head, swapped, 0)) / 2
    np.testing.assert_allclose(predict_depth(head, both, 0), wanted, rtol=1e-6)


def test_four_layers_from_a_checkpoint_are_served_as_they_were_measured(tmp_path: Path) -> None:
    data, ckpt = rooms_folder(tmp_path / "data"), tmp_path / "deep.safetensors"
    torch.manual_seed(0)
    model = ViT(ViTSpec(patch_px=8, width=16, depth=4, heads=2, img_px=32))
    save_backbone(ckpt, model, Manifest(architecture={}, preprocess=SMALL, source="random"))
    head_path = tmp_path / "dpt.safetensors"
    options = DepthRun(ckpt=str(ckpt), data=str(data), cache_dir=None, threads=1)
    spec = DepthSpec(head="dpt", lr=(1e-3,), steps=3, dpt_channels=4, mirror=True)
    result = run(options, spec, head_path)
    assert "DPT decoder" in result["protocol"]
    assert "plain and mirrored" in result["protocol"]
    with open_runtime(ckpt, device="cpu", threads=1, depth_head=head_path) as runtime:
        served = runtime.run(np.zeros((1, 3, 32, 32), np.float32), ("depth",))["depth"]
        assert served.shape == (1, 32, 32)
        with pytest.raises(InputError, match="exported files and servers do"):
            with_layers(MeanColourRuntime(), (0, 1, 2, 3), norm=False)
    with pytest.raises(InputError, match="needs a ViT of 4 blocks or more"):
        run(DepthRun(ckpt=str(small_checkpoint(tmp_path / "a.safetensors")), data=str(data), cache_dir=None), spec)


def test_disparities_are_aligned_and_told_in_pixels(shared_data: Path, tmp_path: Path) -> None:
    ckpt = small_checkpoint(tmp_path / "a.safetensors")
    options = DepthRun(
        ckpt=str(ckpt), data=str(shared_data / "stereo"), cache_dir=None, threads=1, baselines=("mean", "colour")
    )
    result = run(options, DepthSpec(lr=(1e-2,), steps=60))
    assert result["metrics"]["rmse"]["unit"] == "px"
    assert "aligned by scale and shift" in result["protocol"]
    assert result["metrics"]["abs_rel"]["value"] < 0.3
