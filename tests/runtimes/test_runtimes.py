"""The one call: the same numbers and the same refusals on torch, on ONNX Runtime and behind a server."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from backbones.network import Network
from data.errors import InputError
from runtimes.runtime import Runtime

OUTPUTS = ("embedding", "patches", "attention", "depth")


def pixels(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, height, width), dtype=np.float32)


def expected(network: Network, given: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: array.numpy() for name, array in network(torch.from_numpy(given)).items()}


def test_it_says_what_it_is(runtime: Runtime, torch_runtime: Runtime) -> None:
    assert runtime.outputs == OUTPUTS
    assert runtime.name in ("torch", "onnxruntime", "remote")
    assert runtime.manifest == torch_runtime.manifest
    assert runtime.manifest.step == 7


@pytest.mark.parametrize(("n", "height", "width"), [(1, 24, 24), (5, 24, 24), (2, 8, 40), (1, 8, 8), (3, 48, 16)])
def test_every_output_is_the_networks(runtime: Runtime, network: Network, n: int, height: int, width: int) -> None:
    given = pixels(n, height, width)
    wanted, found = expected(network, given), runtime.run(given, OUTPUTS)
    assert tuple(found) == OUTPUTS
    for name, array in found.items():
        assert array.dtype == np.float32
        assert array.shape == wanted[name].shape
        np.testing.assert_allclose(array, wanted[name], atol=2e-5 * np.abs(wanted[name]).max())
    h, w = height // 8, width // 8
    assert found["embedding"].shape == (n, 32)
    assert found["patches"].shape == (n, h * w, 32)
    assert found["attention"].shape == (n, 2, h, w)
    assert found["depth"].shape == (n, height, width)


@pytest.mark.parametrize(
    "outputs", [("embedding",), ("depth",), ("attention", "patches"), ("depth", "embedding"), ["patches"]], ids=str
)
def test_exactly_what_is_asked_for_comes_back_in_that_order(runtime: Runtime, outputs: tuple[str, ...]) -> None:
    given = pixels(2, 24, 16)
    everything, found = runtime.run(given, OUTPUTS), runtime.run(given, outputs)
    assert list(found) == list(outputs)
    for name, array in found.items():
        np.testing.assert_allclose(array, everything[name], atol=1e-6 * np.abs(everything[name]).max())


def test_the_embedding_is_what_comes_when_nothing_is_named(runtime: Runtime) -> None:
    assert list(runtime.run(pixels(1, 8, 8))) == ["embedding"]


def test_a_name_twice_comes_once(runtime: Runtime) -> None:
    assert list(runtime.run(pixels(1, 8, 8), ("patches", "patches"))) == ["patches"]


def test_a_view_of_an_array_is_as_good_as_an_array(runtime: Runtime) -> None:
    given = pixels(4, 24, 16)
    turned = np.ascontiguousarray(given.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)[::-2]
    assert not turned.flags.c_contiguous
    wanted = runtime.run(np.ascontiguousarray(turned))["embedding"]
    np.testing.assert_array_equal(runtime.run(turned)["embedding"], wanted)


def unaligned(array: np.ndarray, start: int) -> np.ndarray:
    """As it would lie in a received message, from any byte of it on."""
    message = memoryview(bytes(start) + array.tobytes())[start:]
    return np.frombuffer(message, np.float32).reshape(array.shape)


def test_the_rows_of_several_messages_are_one_batch(runtime: Runtime) -> None:
    given = pixels(6, 24, 16)
    parts = [unaligned(given[:1], 1), given[1:3], unaligned(given[3:6], 2)]
    wanted, found = runtime.run(given, ("embedding", "depth")), runtime.run_rows(parts, ("embedding", "depth"))
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name])
    alone = runtime.run_rows([unaligned(given[:1], 3)])["embedding"]
    np.testing.assert_array_equal(alone, runtime.run(given[:1])["embedding"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_has_no_answer_and_the_others_of_its_batch_have_theirs(
    runtime: Runtime, value: float
) -> None:
    given = pixels(4, 16, 16)
    bad = given.copy()
    bad[2, 1, 3, 5] = value
    found = runtime.run_rows([bad[:1], bad[1:]], OUTPUTS)
    wanted = runtime.run(given, OUTPUTS)
    for name, array in found.items():
        assert np.isnan(array[2]).all()
        np.testing.assert_allclose(array[[0, 1, 3]], wanted[name][[0, 1, 3]], atol=1e-6 * np.abs(wanted[name]).max())


@pytest.mark.parametrize(
    ("given", "outputs", "words"),
    [
        (pixels(1, 8, 8), ("mask",), "output 'mask' was asked for; this network has embedding, patches, attention"),
        (pixels(1, 8, 8), ("embedding", "Depth"), "output 'Depth' was asked for"),
        (pixels(1, 8, 8), (), "no output was asked for"),
        (pixels(1, 8, 8).astype(np.float64), ("embedding",), r"pixels are float64 \[1, 3, 8, 8\]; wanted float32"),
        (np.zeros((1, 3, 8, 8), np.uint8), ("embedding",), "pixels are uint8"),
        (pixels(1, 8, 8).astype(np.float16), ("embedding",), "pixels are float16"),
        (pixels(1, 8, 8)[0], ("embedding",), r"pixels are float32 \[3, 8, 8\]"),
        (np.zeros((1, 1, 8, 8), np.float32), ("embedding",), r"\[1, 1, 8, 8\]; wanted float32 \[N, 3, H, W\]"),
        (np.zeros((1, 8, 8, 3), np.float32), ("embedding",), r"\[1, 8, 8, 3\]; wanted float32 \[N, 3, H, W\]"),
        (np.zeros((0, 3, 8, 8), np.float32), ("embedding",), "with at least one image"),
        (np.zeros((1, 3, 0, 8), np.float32), ("embedding",), r"\[1, 3, 0, 8\]"),
        (np.zeros((1, 3, 8, 12), np.float32), ("embedding",), "images are 8x12 pixels; wanted .* multiples of 8"),
        (np.zeros((1, 3, 7, 8), np.float32), ("depth",), "images are 7x8 pixels"),
    ],
    ids=range(13),
)
def test_what_cannot_be_run_is_refused_in_one_line_and_the_runtime_goes_on(
    runtime: Runtime, given: np.ndarray, outputs: tuple[str, ...], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        runtime.run(given, outputs)
    assert "\n" not in str(caught.value)
    assert runtime.run(pixels(1, 8, 8))["embedding"].shape == (1, 32)


def test_threads_may_call_it_side_by_side(runtime: Runtime, network: Network) -> None:
    given = [pixels(1 + k % 3, 8 * (1 + k % 4), 24, seed=k) for k in range(24)]
    wanted = [expected(network, array) for array in given]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda array: runtime.run(array, ("embedding", "depth")), given))
    for made, right in zip(found, wanted, strict=True):
        for name, array in made.items():
            np.testing.assert_allclose(array, right[name], atol=2e-5 * np.abs(right[name]).max())


def test_warming_up_runs_once(runtime: Runtime) -> None:
    runtime.warm_up()
