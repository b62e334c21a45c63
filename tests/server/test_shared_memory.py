"""Tensors in system shared memory, by the client library that defines how it is used."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from data.errors import InputError
from server.errors import TooLarge
from server.run import Running
from server.shared_memory import Place, SharedMemory
from tests.server.images import png

pytestmark = pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="this system has no /dev/shm")


@pytest.fixture(params=[grpc_client, http_client], ids=["grpc", "http"])
def wire(server: Running, request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    module = request.param
    address = server.addresses.grpc if module is grpc_client else server.addresses.http.removeprefix("http://")
    client = module.InferenceServerClient(address)
    yield module, client
    client.unregister_system_shared_memory()
    client.close()


@pytest.fixture
def region() -> Iterator[Any]:
    handle = shm.create_shared_memory_region("region", f"/tests-{uuid.uuid4().hex}", 1 << 20)
    yield handle
    shm.destroy_shared_memory_region(handle)


def key_of(handle: Any) -> str:
    return str(handle._shm_key)


def test_inputs_and_outputs_stay_in_shared_memory(wire: tuple[Any, Any], region: Any, server: Running) -> None:
    module, client = wire
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    shm.set_shared_memory_region(region, [pixels])
    client.register_system_shared_memory("region", key_of(region), 1 << 20)
    tensor = module.InferInput("pixels", [2, 3, 32, 32], "FP32")
    tensor.set_shared_memory("region", pixels.nbytes)
    output = module.InferRequestedOutput("embedding")
    output.set_shared_memory("region", 2 * 48 * 4, 1 << 19)
    other = module.InferRequestedOutput("patches")
    reply = client.infer("backbone", [tensor], outputs=[output, other])
    plain = module.InferInput("pixels", [2, 3, 32, 32], "FP32")
    plain.set_data_from_numpy(pixels)
    wanted = client.infer("backbone", [plain])
    found = shm.get_contents_as_numpy(region, np.float32, [2, 48], 1 << 19)
    np.testing.assert_allclose(found, wanted.as_numpy("embedding"), atol=1e-6)
    np.testing.assert_allclose(reply.as_numpy("patches"), wanted.as_numpy("patches"), atol=1e-6)


def test_encoded_images_may_lie_there_too(wire: tuple[Any, Any], region: Any) -> None:
    module, client = wire
    images = np.array([png(0), png(1)], dtype=object)
    shm.set_shared_memory_region(region, [serialize_byte_tensor(images)])
    client.register_system_shared_memory("region", key_of(region), 1 << 20)
    size = sum(4 + len(image) for image in images)
    tensor = module.InferInput("image", [2], "BYTES")
    tensor.set_shared_memory("region", size)
    assert client.infer("embedding", [tensor]).as_numpy("embedding").shape == (2, 48)


def test_regions_are_listed_and_let_go_of(wire: tuple[Any, Any], region: Any) -> None:
    module, client = wire
    client.register_system_shared_memory("one", key_of(region), 1000, offset=24)
    with pytest.raises(InferenceServerException, match="registered already"):
        client.register_system_shared_memory("one", key_of(region), 1000)
    status = client.get_system_shared_memory_status()
    (listed,) = status.regions.values() if module is grpc_client else status
    size, offset = (
        (listed.byte_size, listed.offset) if module is grpc_client else (listed["byte_size"], listed["offset"])
    )
    assert (size, offset) == (1000, 24)
    client.unregister_system_shared_memory("one")
    with pytest.raises(InferenceServerException, match="no shared memory region"):
        client.get_system_shared_memory_status("one")


@pytest.mark.parametrize("key", ["/nothing-there", "../etc/passwd", "/../etc/passwd", "", ".", "a/b"])
def test_what_is_no_shared_memory_is_refused(wire: tuple[Any, Any], key: str) -> None:
    with pytest.raises(InferenceServerException, match=r"cannot be opened|wanted"):
        wire[1].register_system_shared_memory("bad", key, 10)


def counts_of(server: Running) -> tuple[int, int]:
    """Requests to the backbone that succeeded, and those that failed."""
    with grpc_client.InferenceServerClient(server.addresses.grpc) as client:
        (statistics,) = client.get_inference_statistics("backbone").model_stats
    return statistics.inference_stats.success.count, statistics.inference_stats.fail.count


def test_places_beyond_a_region_and_outputs_that_do_not_fit_are_refused(
    wire: tuple[Any, Any], region: Any, server: Running
) -> None:
    module, client = wire
    client.register_system_shared_memory("small", key_of(region), 3 * 32 * 32 * 4)
    tensor = module.InferInput("pixels", [1, 3, 32, 32], "FP32")
    tensor.set_shared_memory("small", 3 * 32 * 32 * 4, 4)
    with pytest.raises(InferenceServerException, match="reach beyond region"):
        client.infer("backbone", [tensor])
    tensor = module.InferInput("pixels", [1, 3, 32, 32], "FP32")
    tensor.set_shared_memory("small", 3 * 32 * 32 * 4)
    output = module.InferRequestedOutput("embedding")
    output.set_shared_memory("small", 8)
    before = counts_of(server)
    with pytest.raises(InferenceServerException, match="does not fit into 8 bytes"):
        client.infer("backbone", [tensor], outputs=[output])
    assert counts_of(server) == (before[0], before[1] + 1), "computed, but not answered"
    with pytest.raises(InferenceServerException, match="has 1048576 bytes"):
        client.register_system_shared_memory("large", key_of(region), 1 << 21)


def test_a_region_that_shrinks_is_an_error_and_not_the_end() -> None:
    path = Path(f"/dev/shm/tests-{uuid.uuid4().hex}")
    path.write_bytes(bytes(8192))
    try:
        shared = SharedMemory(offered=True)
        shared.register("r", path.name, 0, 8192)
        os.truncate(path, 100)
        for act in (lambda: shared.read(Place("r", 4096)), lambda: shared.write(Place("r", 4096), bytes(4096))):
            with pytest.raises(InputError, match="has become smaller"):
                act()
        shared.unregister()
    finally:
        path.unlink()


def test_an_input_beyond_the_servers_memory_is_refused_before_it_is_read() -> None:
    """A region costs its client nothing where it was never written to, and may be as large as it says."""
    path = Path(f"/dev/shm/tests-{uuid.uuid4().hex}")
    path.touch()
    try:
        os.truncate(path, 1 << 40)
        shared = SharedMemory(offered=True, max_bytes=1 << 20)
        shared.register("r", path.name, 0, 1 << 40)
        with pytest.raises(TooLarge, match="larger than this server ever takes: 1 MB"):
            shared.read(Place("r", 1 << 40))
        assert shared.read(Place("r", 1 << 20)) == bytes(1 << 20)
        shared.unregister()
    finally:
        path.unlink()


def test_a_server_for_other_machines_offers_none() -> None:
    with pytest.raises(InputError, match="loopback"):
        SharedMemory(offered=False).register("r", "x", 0, 1)
