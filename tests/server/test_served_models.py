"""What is served is what the network computes, on every wire. Axes: N rows, D feature size, h and w patches."""

import math

import numpy as np
import pytest
from onnxruntime import InferenceSession

from data.decode import decode_image
from data.preprocess import center_view, whole_view
from server.run import Running
from tests.server.conftest import PREPROCESS, config_of
from tests.server.images import encode, jpeg, picture, png
from tests.server.wires import images, open_wire

FILES = (
    png(0),
    jpeg(1, 120, 60),
    encode(".webp", picture(2)),
    encode(".bmp", picture(3, 40, 40)),
    encode(".tiff", picture(4)),
)


def center(*files):
    return np.stack([center_view(decode_image(file), PREPROCESS) for file in files])


def whole(*files, size=None):
    return np.stack([whole_view(decode_image(file), PREPROCESS, size) for file in files])


def same(got, wanted):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_backbone_gives_every_output_of_the_network(wire, runtime):
    pixels = center(*FILES)
    got = wire.infer("backbone", {"pixels": pixels})
    assert list(got) == ["embedding", "patches", "attention"]
    for name, array in runtime.run(pixels, tuple(got)).items():
        same(got[name], array)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 3, 24, 64), (3, 3, 80, 16)])
def test_backbone_takes_any_multiple_of_the_patch(wire, runtime, shape):
    pixels = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    got = wire.infer("backbone", {"pixels": pixels}, ["attention"])
    assert got["attention"].shape == (shape[0], 3, shape[2] // 8, shape[3] // 8)
    same(got["attention"], runtime.run(pixels, ("attention",))["attention"])


def test_embedding_sees_images_as_the_evaluators_do(wire, runtime):
    got = wire.infer("embedding", images(*FILES))
    same(got["embedding"], runtime.run(center(*FILES))["embedding"])


def test_one_image_answers_as_it_does_among_others(wire, runtime):
    got = wire.infer("embedding", images(FILES[1]))
    same(got["embedding"], runtime.run(center(*FILES))["embedding"][1:2])


def test_normalize_scales_to_length_one(wire, runtime):
    plain = runtime.run(center(*FILES))["embedding"]
    got = wire.infer("embedding", images(*FILES), parameters={"normalize": True})["embedding"]
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    same(got, plain / np.linalg.norm(plain, axis=1, keepdims=True))


def test_attention_covers_the_whole_image_and_leaves_out_the_share_of_the_other_tokens(wire, runtime):
    got = wire.infer("attention", images(*FILES))
    same(got["attention"], runtime.run(whole(*FILES), ("attention",))["attention"])
    assert got["attention"].shape == (len(FILES), 3, 6, 6)
    shares = got["attention"].sum(axis=(2, 3))
    assert (shares < 1).all()
    assert (shares > 0).all()


@pytest.mark.parametrize("mass", [0.2, 0.6, 0.95])
def test_mask_is_the_fewest_largest_patches_that_hold_the_mass(wire, mass):
    got = wire.infer("attention", images(*FILES), parameters={"mass": mass})
    maps, masks = got["attention"].reshape(-1, 36), got["mask"].reshape(-1, 36)
    assert got["mask"].dtype == np.uint8
    for map_n, mask_n in zip(maps, masks, strict=True):
        total, held, chosen = math.fsum(map_n), 0.0, set()
        for patch in sorted(range(36), key=lambda patch: -map_n[patch]):
            if held >= mass * total:
                break
            chosen.add(patch)
            held += float(map_n[patch])
        assert set(np.flatnonzero(mask_n)) == chosen


def test_mass_is_0_6_where_nothing_is_said(wire):
    same_mass = wire.infer("attention", images(*FILES), ["mask"], {"mass": 0.6})
    assert list(same_mass) == ["mask"]
    np.testing.assert_array_equal(wire.infer("attention", images(*FILES), ["mask"])["mask"], same_mass["mask"])


@pytest.mark.parametrize("size", [8, 96])
def test_size_sets_the_side_that_the_image_is_squashed_to(wire, runtime, size):
    maps = wire.infer("attention", images(*FILES), ["attention"], {"size": size})["attention"]
    same(maps, runtime.run(whole(*FILES, size=size), ("attention",))["attention"])
    depth = wire.infer("depth", images(*FILES), parameters={"size": size})["depth"]
    assert depth.shape == (len(FILES), size, size)
    same(depth, runtime.run(whole(*FILES, size=size), ("depth",))["depth"])


def test_depth_is_the_head_on_the_whole_image(wire, runtime):
    got = wire.infer("depth", images(*FILES))["depth"]
    assert got.shape == (len(FILES), 48, 48)
    same(got, runtime.run(whole(*FILES), ("depth",))["depth"])


def test_knn_finds_what_a_slow_search_finds(wire, runtime, colours):
    """By hand: embed each sample and each query, sort by cosine, equals in the order of the data set."""
    paths = sorted((colours / "train").glob("*/*.png"))
    samples = runtime.run(center(*(path.read_bytes() for path in paths)))["embedding"].astype(np.float64)
    queries = runtime.run(center(*FILES))["embedding"].astype(np.float64)
    got = wire.infer("knn", images(*FILES), parameters={"k": 7})
    assert got["ids"].shape == got["labels"].shape == got["scores"].shape == (len(FILES), 7)
    for row, query in enumerate(queries):
        cosine = [float(query @ one / math.sqrt((query @ query) * (one @ one))) for one in samples]
        np.testing.assert_allclose(got["scores"][row], sorted(cosine, reverse=True)[:7], atol=1e-5)
        by_id = {f"{path.parent.name}:{path.stem}": value for path, value in zip(paths, cosine, strict=True)}
        found = [one.decode() for one in got["ids"][row]]
        assert len(set(found)) == 7
        np.testing.assert_allclose([by_id[one] for one in found], got["scores"][row], atol=1e-5)
        assert [one.decode() for one in got["labels"][row]] == [one.split(":")[0] for one in found]


def test_knn_takes_embeddings_in_the_place_of_images(wire, runtime):
    by_image = wire.infer("knn", images(*FILES))
    by_vector = wire.infer("knn", {"embedding": runtime.run(center(*FILES))["embedding"]})
    assert by_image["ids"].shape == (len(FILES), 5)
    np.testing.assert_array_equal(by_image["ids"], by_vector["ids"])
    same(by_vector["scores"], by_image["scores"])


def test_knn_searches_the_collection_that_is_named(wire, http):
    vectors = np.eye(48, dtype=np.float32)[:3]
    items = [{"embedding": vector.tolist(), "id": f"axis{n}"} for n, vector in enumerate(vectors)]
    http.delete("/v1/collections/axes")
    assert http.post("/v1/collections/axes/items", json={"items": items}).status_code == 201
    got = wire.infer("knn", {"embedding": vectors[1:2] * 3}, parameters={"collection": "axes", "k": 1})
    assert (got["ids"].item(), got["labels"].item(), got["scores"].item()) == (b"axis1", b"", 1.0)


def test_images_of_any_size_share_a_request(wire, runtime):
    files = [png(seed, 20 + 13 * seed, 150 - 11 * seed) for seed in range(9)]
    same(wire.infer("embedding", images(*files))["embedding"], runtime.run(center(*files))["embedding"])


@pytest.mark.parametrize("name", ["grpc", "http"])
def test_random_bits_of_a_load_generator_are_answered(server, name):
    """perf_analyzer fills tensors with random bits, of which one value in 256 is infinite or no number."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, (2, 3, 32, 32), dtype=np.uint32).view(np.float32)
    assert not np.isfinite(bits).all()
    opened = open_wire(name, server.addresses)
    assert opened.infer("backbone", {"pixels": bits}, ["embedding"])["embedding"].shape == (2, 48)
    opened.close()


def test_overview_gives_what_the_other_models_give_of_the_whole_image(wire, runtime):
    got = wire.infer("overview", images(*FILES))
    assert list(got) == ["embedding", "attention", "mask", "depth"]
    right = runtime.run(whole(*FILES), ("embedding", "attention", "depth"))
    for name, array in right.items():
        same(got[name], array)
    assert np.array_equal(got["mask"], wire.infer("attention", images(*FILES), ["mask"])["mask"])


def test_attention_depth_and_embedding_of_an_image_cost_one_forward_pass(onnx_file, tmp_path, monkeypatch):
    passes = []

    def counted(session, names, *args, run=InferenceSession.run):
        passes.append(tuple(names))
        return run(session, names, *args)

    with Running(config_of(onnx_file, tmp_path / "state")) as running:
        wire = open_wire("grpc", running.addresses)
        monkeypatch.setattr(InferenceSession, "run", counted)
        assert len(wire.infer("overview", images(png(0)), ["attention", "depth", "embedding"])) == 3
        assert ["backbone" if "embedding" in one else one[0] for one in passes] == ["backbone", "depth"]
        wire.close()
