"""Who gets in: tokens, scopes, rates and certificates, on both wires."""

import ssl
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from cryptography.hazmat.primitives import serialization
from tritonclient.utils import InferenceServerException

import app
import demo.client
import runtimes.remote
from data.errors import InputError
from runtimes.open import open_runtime
from server.access import Access, Rates, needed_on_grpc, needed_on_http
from server.errors import Forbidden, Overloaded, Unauthenticated
from server.run import Running
from server.tls import Tls
from tests.server.conftest import config_of
from tests.server.images import png

READER, WRITER = "r" * 20, "w" * 24
ADMIN = {"authorization": f"Bearer {WRITER}"}
USE = {"authorization": f"Bearer {READER}"}


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(f"# who is who\nreader use {READER}\n\nwriter admin {WRITER}  # ours\n")
    return path


@pytest.fixture(scope="module")
def guarded(network: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    config = config_of(network, tmp_path_factory.mktemp("state"), token_file=token_file)
    with Running(config) as running:
        yield running


def test_what_is_not_open_wants_a_token(guarded: Running) -> None:
    with httpx.Client(base_url=guarded.addresses.http) as client:
        for path in ("/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        for path in ("/v2", "/v2/models/embedding", "/v1/collections", "/metrics", "/nothing"):
            refused = client.get(path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert "Bearer TOKEN" in refused.json()["error"]
        for wrong in (f"Bearer {READER}x", f"Basic {READER}", READER, "Bearer", "Bearer \xff"):
            assert client.get("/v2", headers={"authorization": wrong.encode("latin-1")}).status_code == 401
        assert client.get("/v2", headers=USE).status_code == 200


def test_writing_wants_the_scope_admin(guarded: Running) -> None:
    file = {"file": ("a.png", png(0), "image/png")}
    with httpx.Client(base_url=guarded.addresses.http) as client:
        refused = client.post("/v1/collections/birds/items", files=file, headers=USE)
        assert refused.status_code == 403
        assert "scope admin" in refused.json()["error"]
        assert client.post("/v1/collections/birds/items", files=file, headers=ADMIN).status_code == 201
        assert client.post("/v1/collections/birds/search", files=file, headers=USE).status_code == 200
        assert client.delete("/v1/collections/birds", headers=USE).status_code == 403
        assert client.post("/v1/evaluations", json={"evaluator": "knn", "data": "x"}, headers=USE).status_code == 403
        assert client.post("/v1/embeddings", files=file, headers=USE).status_code == 200


def test_a_target_that_is_a_whole_url_wants_what_its_path_wants(guarded: Running) -> None:
    with httpx.Client(base_url=guarded.addresses.http) as client:

        def status(method: str, target: str, headers: dict[str, str] | None = None) -> int:
            return client.request(method, "/", headers=headers, extensions={"target": target.encode()}).status_code

        assert status("GET", "http://x/v2/health/live") == 200
        for target in ("http://x/v2", "http://x//v2/health/live", "http://v2/health/live", "http:///v2/health/live"):
            assert status("GET", target) == 401
        assert status("GET", "http://x/v2", USE) == 200
        assert status("DELETE", "http://x/v1/collections/nothing", USE) == 403
        assert status("DELETE", "http://x/v1/collections/nothing", ADMIN) == 404


def test_the_page_of_the_api_says_which_routes_want_a_token(guarded: Running, http: httpx.Client) -> None:
    """So that clients made of it have a place for one, and send it."""
    for _ in range(2):
        page = httpx.get(f"{guarded.addresses.http}/openapi.json").json()
    assert page["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    wanted = {
        (method, path): (operation.get("security"), operation.get("description", "").count("the scope admin"))
        for path, methods in page["paths"].items()
        for method, operation in methods.items()
    }
    token = [{"token": []}]
    assert wanted["get", "/v2/health/ready"] == (None, 0)
    assert wanted["post", "/v1/embeddings"] == wanted["post", "/v1/collections/{name}/search"] == (token, 0)
    assert wanted["post", "/v1/collections/{name}/items"] == wanted["delete", "/v1/evaluations/{run_id}"] == (token, 1)
    open_page = http.get("/openapi.json").json()
    assert "securitySchemes" not in open_page["components"]
    assert not any("security" in operation for methods in open_page["paths"].values() for operation in methods.values())


def test_grpc_wants_the_same_token_as_metadata(guarded: Running) -> None:
    with triton_grpc.InferenceServerClient(guarded.addresses.grpc) as client:
        assert client.is_server_live()
        with pytest.raises(InferenceServerException) as refused:
            client.get_server_metadata()
        assert refused.value.status() == "StatusCode.UNAUTHENTICATED"
        assert client.get_server_metadata(headers=USE).name == "dinoscope"
        image = triton_grpc.InferInput("image", [1], "BYTES")
        image.set_data_from_numpy(np.array([png(0)], dtype=object))
        assert client.infer("embedding", [image], headers=USE).as_numpy("embedding").shape == (1, 48)
        stream = grpc.insecure_channel(guarded.addresses.grpc).stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer", lambda _: b"", lambda answer: answer
        )
        with pytest.raises(grpc.RpcError) as unnamed:
            list(stream(iter([b""]), timeout=30))
        assert unnamed.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert len(list(stream(iter([b""]), timeout=30, metadata=[*USE.items()]))) == 1
        with pytest.raises(InferenceServerException) as refused:
            client.load_model("embedding", headers=USE)
        assert refused.value.status() == "StatusCode.PERMISSION_DENIED"


def test_the_health_service_stays_open(guarded: Running) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(guarded.addresses.grpc) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("method", "path", "needed"),
    [
        ("GET", "/v2/health/live", None),
        ("GET", "/v1/collections/a/items", "use"),
        ("GET", "/v1/collections/a/export", "use"),
        ("POST", "/v1/collections/a/classify", "use"),
        ("POST", "/v1/collections/a/import", "admin"),
        ("POST", "/v1/collections/search/items", "admin"),
        ("DELETE", "/v1/evaluations/x", "admin"),
        ("POST", "/v2/repository/models/a/load", "admin"),
        ("POST", "/v2/repository/index", "use"),
        ("POST", "/v2/models/embedding/infer", "use"),
    ],
)
def test_each_route_has_its_scope(method: str, path: str, needed: str | None) -> None:
    assert needed_on_http(method, path) == needed


def test_each_rpc_has_its_scope() -> None:
    assert [needed_on_grpc(name) for name in ("ServerLive", "ModelInfer", "RepositoryModelUnload")] == [
        None,
        "use",
        "admin",
    ]


def test_tokens_are_kept_as_hashes_and_checked(token_file: Path) -> None:
    access = Access.from_file(token_file)
    assert READER not in repr(vars(access))
    assert access.check(f"Bearer {READER}", "use", "1.2.3.4") == "reader"
    assert access.check(None, None, "1.2.3.4") == "1.2.3.4"
    with pytest.raises(Unauthenticated):
        access.check(None, "use", "1.2.3.4")
    with pytest.raises(Forbidden):
        access.check(f"Bearer {READER}", "admin", "1.2.3.4")
    assert Access().check(None, "admin", "1.2.3.4") == "1.2.3.4"


def test_a_token_may_have_a_hash_within_and_a_comment_behind_it(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("# who may\na use 0123456789abcdef#ghi  # of the night shift\n")
    assert Access.from_file(tmp_path / "tokens").check("Bearer 0123456789abcdef#ghi", "use", "") == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no token"),
        ("a use short", "line 1: wanted NAME"),
        (f"a root {READER}", "line 1: wanted NAME"),
        ("a use pässword-0123456789", "line 1: wanted NAME"),
        (f"a use {READER}\na use {WRITER}", "a name stands in two lines"),
    ],
)
def test_a_token_file_that_cannot_be_meant_is_refused_without_showing_it(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        Access.from_file(tmp_path / "tokens")
    assert READER not in str(refused.value)


def test_another_address_wants_tokens_or_a_plain_word(network: Path, token_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name a --token-file"):
        config_of(network, tmp_path, host="0.0.0.0").check()
    config_of(network, tmp_path, host="0.0.0.0", token_file=token_file).check()
    config_of(network, tmp_path, host="0.0.0.0", public=True).check()
    with pytest.raises(InputError, match="go together"):
        config_of(network, tmp_path, tls_cert=token_file).check()


def test_a_client_that_sends_too_much_is_told_when_to_come_back() -> None:
    rates = Rates(2.0)
    rates.take("a", 20)
    with pytest.raises(Overloaded) as refused:
        rates.take("a", 4)
    assert 1 <= refused.value.retry_after_s <= 2
    rates.take("b", 20)
    large = Rates(1.0)
    large.take("a", 500)  # larger than a burst: passes once, and is paid for afterwards
    with pytest.raises(Overloaded):
        large.take("a", 1)
    Rates(None).take("a", 10**9)


def test_a_rate_holds_on_the_wire_for_each_client(network: Path, token_file: Path, tmp_path: Path) -> None:
    config = config_of(network, tmp_path, token_file=token_file, client_rows_per_s=0.1)
    file = {"file": ("a.png", png(0), "image/png")}
    with Running(config) as running, httpx.Client(base_url=running.addresses.http) as client:
        assert client.post("/v1/embeddings", files=file, headers=USE).status_code == 200
        refused = client.post("/v1/embeddings", files=file, headers=USE)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert client.post("/v1/embeddings", files=file, headers=ADMIN).status_code == 200


def test_tls_and_client_certificates_on_both_wires(network: Path, authority: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(
        network,
        tmp_path,
        tls_cert=authority["server.pem"],
        tls_key=authority["server.key"],
        tls_client_ca=authority["ca.pem"],
    )
    ca, pair = str(authority["ca.pem"]), (str(authority["client.pem"]), str(authority["client.key"]))
    with Running(config) as running:
        where = running.addresses.http
        assert where.startswith("https://")
        known, stranger = (ssl.create_default_context(cafile=ca) for _ in range(2))
        known.load_cert_chain(*pair)
        with httpx.Client(base_url=where, verify=known) as client:
            assert client.get("/v2/health/ready").status_code == 200
        with pytest.raises(httpx.TransportError), httpx.Client(base_url=where, verify=stranger) as client:
            client.get("/v2/health/ready")
        with pytest.raises(httpx.TransportError):
            httpx.get(where.replace("https", "http"))
        keys = {"ssl": True, "root_certificates": ca, "private_key": pair[1], "certificate_chain": pair[0]}
        with triton_grpc.InferenceServerClient(running.addresses.grpc, **keys) as client:
            assert client.is_server_ready()
        with (
            triton_grpc.InferenceServerClient(running.addresses.grpc, ssl=True, root_certificates=ca) as client,
            pytest.raises(InferenceServerException),
        ):
            client.is_server_ready(client_timeout=5)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_an_evaluator_brings_its_token(guarded: Running, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = guarded.addresses.http if scheme == "http" else f"grpc://{guarded.addresses.grpc}"
    with pytest.raises(InputError, match="Bearer TOKEN"):
        open_runtime(address)
    monkeypatch.setenv("DINOSCOPE_TOKEN", READER)
    with open_runtime(address) as remote:
        assert remote.run(np.zeros((2, 3, 32, 32), np.float32))["embedding"].shape == (2, 48)
    monkeypatch.setenv("DINOSCOPE_TOKEN", "two words")
    with pytest.raises(InputError, match="wanted the token alone"):
        open_runtime(address)


@pytest.fixture(scope="module")
def secured(
    network: Path, authority: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server that wants a token, and a certificate of its clients."""
    files = {"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "ca.pem"}
    named = {flag: authority[name] for flag, name in files.items()}
    config = config_of(network, tmp_path_factory.mktemp("secured"), token_file=token_file, **named)
    with Running(config) as running:
        yield running


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_an_evaluator_speaks_tls_and_shows_its_certificate(
    secured: Running, authority: dict[str, Path], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = secured.addresses.http if scheme == "https" else f"grpcs://{secured.addresses.grpc}"
    monkeypatch.setattr(runtimes.remote, "OPENING_TIMEOUT_S", 3.0)
    monkeypatch.setenv("DINOSCOPE_TOKEN", READER)
    with pytest.raises(InputError, match="no server there"):  # an authority that this machine does not know
        open_runtime(address)
    monkeypatch.setenv("DINOSCOPE_CA", str(authority["ca.pem"]))
    with pytest.raises(InputError, match="no server there"):  # and no certificate of our own
        open_runtime(address).run(np.zeros((1, 3, 32, 32), np.float32))
    monkeypatch.setenv("DINOSCOPE_CLIENT_CERT", str(authority["client.pem"]))
    with pytest.raises(InputError, match="go together"):
        open_runtime(address)
    monkeypatch.setenv("DINOSCOPE_CLIENT_KEY", str(authority["client.key"]))
    with open_runtime(address) as remote:
        assert remote.run(np.zeros((2, 3, 32, 32), np.float32))["embedding"].shape == (2, 48)
    monkeypatch.setenv("DINOSCOPE_CA", str(authority["ca.pem"]) + ".gone")
    with pytest.raises(InputError, match=r"DINOSCOPE_CA: .* is no file"):
        open_runtime(address)


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_the_demo_brings_its_token_and_its_certificate(
    secured: Running, authority: dict[str, Path], scheme: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address = secured.addresses.http if scheme == "https" else f"grpcs://{secured.addresses.grpc}"
    monkeypatch.setattr(runtimes.remote, "OPENING_TIMEOUT_S", 3.0)
    monkeypatch.setattr(demo.client, "TIMEOUT_S", 3.0)
    monkeypatch.setenv("DINOSCOPE_CA", str(authority["ca.pem"]))
    monkeypatch.setenv("DINOSCOPE_CLIENT_CERT", str(authority["client.pem"]))
    monkeypatch.setenv("DINOSCOPE_CLIENT_KEY", str(authority["client.key"]))
    with pytest.raises(gr.Error, match="wants a token"):
        demo.client.Served(address).models()
    monkeypatch.setenv("DINOSCOPE_TOKEN", WRITER)
    with app.second_server(address, tmp_path) as served:
        assert served.is_ready()
        assert served.models() == {"attention", "knn", "depth"}
        assert served.ask("attention", [png(0)], {})["attention"].shape[0] == 1
        assert served.patches([np.zeros((40, 40, 3), np.uint8)], 32).shape[:3] == (1, 4, 4)
        if scheme == "https":
            item = {"file": ("a.png", png(0), "image/png")}
            assert served.post("/v1/collections/mine/items?id=x", files=item)["ids"]
            assert served.get("/v1/collections")["collections"][0]["name"] == "mine"
        app.make_page(served, None, app.SAMPLES, tmp_path, bundled=False)
    monkeypatch.delenv("DINOSCOPE_CLIENT_CERT")
    monkeypatch.delenv("DINOSCOPE_CLIENT_KEY")
    with pytest.raises(gr.Error, match="does not answer"):
        demo.client.Served(address).models()


def test_a_triton_http_client_sends_its_token(guarded: Running) -> None:
    client = triton_http.InferenceServerClient(guarded.addresses.http.removeprefix("http://"))
    assert client.get_model_metadata("embedding", headers=USE)["name"] == "embedding"
    client.close()


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_passphrase(
    authority: dict[str, Path], tmp_path: Path
) -> None:
    key = serialization.load_pem_private_key(authority["server.key"].read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    (tmp_path / "locked.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    )
    with pytest.raises(InputError, match=r"locked\.key: is encrypted"):
        Tls(authority["server.pem"], tmp_path / "locked.key")


def test_certificates_that_do_not_fit_are_refused_at_once(
    network: Path, authority: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(network, tmp_path, tls_cert=authority["server.pem"], tls_key=authority["client.key"])
    with pytest.raises(InputError, match="cannot be used"):
        _ = config.tls
