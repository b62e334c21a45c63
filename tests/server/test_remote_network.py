"""A running server in the place of a file: `grpc://host:port` and `http://host:port` as `--ckpt`."""

import numpy as np
import pytest

from data.errors import InputError
from evaluators import knn
from evaluators.classification import ClassificationRun
from runtimes import remote
from runtimes.open import open_runtime

OUTPUTS = ("embedding", "patches", "attention")


@pytest.fixture(params=["grpc", "http"])
def address(server, request):
    """Where the shared server is, as --ckpt takes it."""
    return server.addresses.http if request.param == "http" else f"grpc://{server.addresses.grpc}"


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (5, 3, 48, 16), (40, 3, 8, 8)])
def test_a_server_gives_the_features_of_its_file(address, runtime, shape):
    """40 rows are more than this server takes at once, so they travel in parts."""
    pixels = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    with open_runtime(address) as served:
        assert served.outputs == OUTPUTS
        assert served.manifest == runtime.manifest
        found, wanted = served.run(pixels, OUTPUTS), runtime.run(pixels, OUTPUTS)
    for name in OUTPUTS:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("outputs", [("embedding",), ("patches",), OUTPUTS])
def test_neither_request_nor_reply_outgrows_a_message(address, runtime, outputs, monkeypatch):
    """Patches of a small image can be larger than the image: here 16 x 48 values a row, and 3 x 32 x 32 pixels."""
    limit = 40_000
    monkeypatch.setattr(remote, "MAX_MESSAGE_BYTES", limit)
    pixels = np.random.default_rng(0).standard_normal((9, 3, 32, 32), dtype=np.float32)
    with open_runtime(address) as served:
        infer, sizes = served._infer, []

        def watched(part, names):
            answer = infer(part, names)
            sizes.append((part.nbytes, sum(array.nbytes for array in answer.values())))
            return answer

        monkeypatch.setattr(served, "_infer", watched)
        found = served.run(pixels, outputs)
    assert len(sizes) > 1
    assert max(max(both) for both in sizes) <= limit
    for name, array in runtime.run(pixels, outputs).items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)


def test_an_evaluator_finds_on_the_server_what_it_finds_on_the_file(address, network, colours):
    def measure(ckpt):
        options = ClassificationRun(ckpt=str(ckpt), data=str(colours), cache_dir=None, device="cpu", threads=1)
        return knn.run(options)

    assert measure(address)["metrics"] == measure(network / "backbone.safetensors")["metrics"]


def test_nobody_at_the_address_is_an_error():
    with pytest.raises(InputError, match="no server there"):
        open_runtime("grpc://127.0.0.1:1")
