"""A server's address in, a tritonclient that may talk to it out: plain or TLS, with a token where the server wants one.

What must not stand in an address or in a result file comes from the environment:

    DINOSCOPE_TOKEN          sent as `authorization: Bearer TOKEN` with every request
    DINOSCOPE_CA             PEM file of the authorities that a grpcs:// or https:// server is trusted by; the system's own without it
    DINOSCOPE_CLIENT_CERT    PEM files of this client's certificate and key, for servers that want one (mTLS)
    DINOSCOPE_CLIENT_KEY
"""

import importlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.errors import InputError

REMOTE_SCHEMES = ("grpc://", "http://", "grpcs://", "https://", "grpc+unix:")
TOKEN, CA, CLIENT_CERT, CLIENT_KEY = "DINOSCOPE_TOKEN", "DINOSCOPE_CA", "DINOSCOPE_CLIENT_CERT", "DINOSCOPE_CLIENT_KEY"
CLIENT_VARIABLES = frozenset({TOKEN, CA, CLIENT_CERT, CLIENT_KEY})
"""Variables that are about talking to a server, not about being one."""
CONNECT_TIMEOUT_S = 10.0
_HOST = re.compile(r"[\w-]+(\.[\w-]+)*\.?|\[[0-9a-fA-F:.]+\]")
"""A name, an IPv4 address, or an IPv6 address in brackets."""
_TOKEN_TEXT = re.compile(r"[\x21-\x7e]+")


def split_address(address: str) -> tuple[str, str]:
    """Scheme, and host:port (of `grpc+unix:` the path), of a server's address. Raises InputError."""
    if address.startswith("grpc+unix:") and address.removeprefix("grpc+unix:").startswith("/"):
        return "grpc+unix", address.removeprefix("grpc+unix:")
    scheme, _, where = address.partition("://")
    where = where.rstrip("/")
    host, _, port = where.rpartition(":")
    if (
        f"{scheme}://" not in REMOTE_SCHEMES
        or not _HOST.fullmatch(host)
        or not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65_536)
    ):
        raise InputError(f"{address}: wanted grpc://host:port or http://host:port; with TLS grpcs:// or https://")
    return scheme, where


class Connection:
    """How to reach one server. A gRPC channel is shared by all threads; over HTTP each exchange has a client of its own, since
    tritonclient's belongs to one thread."""

    def __init__(self, address: str, environment: Mapping[str, str] | None = None) -> None:
        """Raises InputError for an address, a token or a certificate that cannot be used."""
        environment = os.environ if environment is None else environment
        self.scheme, self.where = split_address(address)
        self._grpc = self.scheme.startswith("grpc")
        self.wire: Any = importlib.import_module(f"tritonclient.{'grpc' if self._grpc else 'http'}")
        """The module with InferInput and InferRequestedOutput that fit; loaded here, since it takes a while and most commands need none."""
        self.headers = _headers(environment)
        self._tls = _tls(environment) if self.scheme in ("grpcs", "https") else None
        self._channel: Any = None

    @contextmanager
    def client(self, timeout_s: float) -> Iterator[tuple[Any, dict[str, Any]]]:
        """A client for one exchange, and what each of its calls must be given: the token, and that it ends after `timeout_s`."""
        said: dict[str, Any] = {"headers": self.headers} if self.headers else {}
        if self._grpc:
            if self._channel is None:
                self._channel = self._open_channel()
            yield self._channel, said | {"client_timeout": timeout_s}
            return
        client = self._open_http(timeout_s)
        try:
            yield client, said
        finally:
            client.close()

    def _open_channel(self) -> Any:
        where = f"unix:{self.where}" if self.scheme == "grpc+unix" else self.where
        if self._tls is None:
            return self.wire.InferenceServerClient(where)
        files = {"root_certificates": CA, "certificate_chain": CLIENT_CERT, "private_key": CLIENT_KEY}
        return self.wire.InferenceServerClient(
            where, ssl=True, **{name: self._tls.get(variable) for name, variable in files.items()}
        )

    def _open_http(self, timeout_s: float) -> Any:
        options: dict[str, Any] = {"connection_timeout": CONNECT_TIMEOUT_S, "network_timeout": timeout_s}
        if self._tls is not None:
            names = {CA: "ca_certs", CLIENT_CERT: "certfile", CLIENT_KEY: "keyfile"}
            options |= {"ssl": True, "ssl_options": {names[key]: path for key, path in self._tls.items()}}
        return self.wire.InferenceServerClient(self.where, **options)

    def close(self) -> None:
        """Give the channel back."""
        if self._channel is not None:
            self._channel.close()


def _headers(environment: Mapping[str, str]) -> dict[str, str]:
    token = environment.get(TOKEN, "").strip()
    if token and not _TOKEN_TEXT.fullmatch(token):
        raise InputError(f"{TOKEN}: holds spaces or letters outside ASCII; wanted the token alone")
    return {"authorization": f"Bearer {token}"} if token else {}


def _tls(environment: Mapping[str, str]) -> dict[str, str]:
    """The PEM files that are named, by their variables."""
    files = {name: environment[name] for name in (CA, CLIENT_CERT, CLIENT_KEY) if environment.get(name)}
    for name, path in files.items():
        if not Path(path).is_file():
            raise InputError(f"{name}: {path} is no file; wanted a PEM file")
    if (CLIENT_CERT in files) != (CLIENT_KEY in files):
        raise InputError(f"{CLIENT_CERT} and {CLIENT_KEY} go together; name the missing one")
    return files
