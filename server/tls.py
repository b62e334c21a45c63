"""Certificates for both wires: files in, what uvicorn and gRPC want out."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from data.errors import InputError


@dataclass(frozen=True)
class Tls:
    """PEM files: the server's chain and key, and the authorities of client certificates where these are wanted."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        """Try the files at once. Raises InputError for what cannot be read or does not fit."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key, self._ask_nobody)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"--tls-cert {self.cert}, --tls-key, --tls-client-ca: cannot be used ({error})") from error

    def _ask_nobody(self) -> str:
        """In the place of OpenSSL's question for a passphrase, which waits for a terminal, once for each wire."""
        raise InputError(
            f"--tls-key {self.key}: is encrypted, and nobody is there to be asked for its passphrase; "
            "give a plain one that only the server's user may read (openssl pkey -in KEY -out PLAIN)"
        )

    def for_uvicorn(self) -> dict[str, Any]:
        """Arguments of uvicorn's configuration."""
        found: dict[str, Any] = {"ssl_certfile": str(self.cert), "ssl_keyfile": str(self.key)}
        if self.client_ca is not None:
            found |= {"ssl_ca_certs": str(self.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        return found

    def for_grpc(self) -> grpc.ServerCredentials:
        """Credentials of a gRPC port."""
        pair = (self.key.read_bytes(), self.cert.read_bytes())
        authorities = None if self.client_ca is None else self.client_ca.read_bytes()
        return grpc.ssl_server_credentials([pair], authorities, require_client_auth=authorities is not None)
