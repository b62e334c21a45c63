"""Everything the operator can set: one frozen dataclass, which is also the command line."""

import ipaddress
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import InputError
from server.tls import Tls

REPOSITORY = Path(__file__).resolve().parents[1]
MOST_MESSAGE_MB = 2047
"""gRPC counts a message's bytes in 31 bits."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Serve a backbone and its heads over gRPC and HTTP (KServe v2, and REST for people)."""

    models: Path
    """What to serve: one artifact (.safetensors, .onnx, .plan); a folder with one backbone and heads that fit it, such as
    models/ (of the same weights in both forms the .onnx is taken where it has every output); or a Triton repository
    with one NAME/VERSION/model.onnx, of whose versions the highest is taken."""
    version: str | None = None
    """Which version of a Triton repository to serve; the highest if left out."""
    config: Path | None = None
    """TOML file with any of these settings, by name with underscores; the environment (DINOSCOPE_HTTP_PORT=9000) goes before it, and flags
    before both."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but this machine's loopback needs --public."""
    http_port: int = 8000
    """Port of REST and KServe v2 over HTTP; 0 takes a free one and prints it, here and below."""
    grpc_port: int = 8001
    """Port of KServe v2 over gRPC."""
    metrics_port: int = 8002
    """Port of the Prometheus page (also at /metrics of the HTTP port)."""
    public: bool = False
    """Listen on other addresses although there are no tokens: whoever reaches the ports can do anything."""
    token_file: Path | None = None
    """Lines of NAME, `use` or `admin`, and a token; requests then need `authorization: Bearer TOKEN`. `use` may run models, read and
    search; `admin` may also write collections, start evaluations, load and unload. Health and the documentation stay open, and so does the
    metrics port."""
    tls_cert: Path | None = None
    """Certificate chain (PEM) of this server: HTTPS and TLS for gRPC, instead of plain text."""
    tls_key: Path | None = None
    """Its private key (PEM)."""
    tls_client_ca: Path | None = None
    """Authorities (PEM) of client certificates; clients without one are then refused (mTLS)."""
    client_rows_per_s: float | None = None
    """Rows a second that one client (token, else address) may send in the long run; ten seconds' worth at once. Left out: no bound."""

    collections: Path | None = None
    """Folder of the collections and evaluation results, for one server at a time. Left out: dinoscope/server in
    $XDG_DATA_HOME or ~/.local/share."""
    database: str | None = None
    """postgresql://user:password@host:port/name: keep the collections there, shared with other servers of the same database."""
    samples: str | None = None
    """Images of the collection `samples` that `knn` searches by default: anything that --data takes elsewhere, or `none`.
    Left out: samples/samples.csv of this repository, where it exists."""
    evaluation_data: tuple[str, ...] = ()
    """Data sets that clients may evaluate the served network on, each as NAME=PATH."""

    device: str = "auto"
    """Where the network runs: auto, cpu, cuda, cuda:1; or several (cuda:0,cuda:1) with `--instances` copies on each."""
    instances: int | None = None
    """Copies of the network that run at the same time. Left out: on a GPU one, on a CPU as many as there are cores for `--threads` each."""
    threads: int | None = None
    """CPU threads of each copy. Left out: one where `--instances` is left out too, else the copies share the cores. One thread a copy
    gives the most images a second, all cores in one copy (`--instances 1`) the shortest answer to a single request."""
    spinning: bool = False
    """Let the threads of a copy spin while they wait for each other: a little faster on cores of its own, slower on shared ones."""
    decode_threads: int = 2
    """Threads that decode and resize images."""
    max_batch_rows: int = 8
    """Largest batch that is put together; larger requests are split."""
    batch_delay_us: int = 0
    """How long a batch may wait for more rows while the network is idle: 0 on a CPU, 1000 to 2000 on a GPU."""

    queue_rows: int = 256
    """Rows that may be inside the server at once; more are refused (RESOURCE_EXHAUSTED, 429)."""
    queue_mb: int = 1024
    """Memory that these rows may need, and as much again for the network while it runs."""
    max_message_mb: int = 64
    """Largest request and reply."""
    max_size_px: int = 1024
    """Largest side that a request may ask the network to see."""

    triton_codes: bool = False
    """Refuse what does not fit with the codes of Triton, UNAVAILABLE and 503, for clients and load balancers that wait for these."""
    traces: bool = False
    """Send each request's times as OpenTelemetry spans (OTLP over HTTP, to OTEL_EXPORTER_OTLP_ENDPOINT); needs the extra `otel`."""

    drain_delay_s: float = 0.0
    """After SIGTERM: how long to go on serving while readiness already says no."""
    grace_s: float = 30.0
    """After that: how long accepted requests have to finish."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """At info every request is a line."""

    def check(self) -> None:
        """Raise InputError for a value that makes no sense."""
        at_least = {"decode_threads": 1, "max_batch_rows": 1, "batch_delay_us": 0, "queue_rows": 1}
        at_least |= {"queue_mb": 1, "max_message_mb": 1, "max_size_px": 1, "drain_delay_s": 0, "grace_s": 0}
        for name, lowest in at_least.items():
            if not lowest <= getattr(self, name) < math.inf:
                wanted = "a time that ends" if getattr(self, name) == math.inf else f"at least {lowest}"
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: wanted {wanted}")
        for name in ("http_port", "grpc_port", "metrics_port"):
            if not 0 <= getattr(self, name) < 1 << 16:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: wanted 0 to 65535")
        if self.max_message_mb > MOST_MESSAGE_MB:
            raise InputError(
                f"--max-message-mb {self.max_message_mb}: wanted at most {MOST_MESSAGE_MB}; gRPC has no larger messages"
            )
        for name in ("instances", "threads"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise InputError(f"--{name} {given}: wanted at least 1")
        if not self.host:
            raise InputError("--host '': wanted an address, such as 127.0.0.1, or 0.0.0.0 for all of this machine's")
        if not self.public and self.token_file is None and not is_loopback(self.host):
            raise InputError(
                f"--host {self.host}: other machines could reach this server, which has no access control; "
                "keep 127.0.0.1, name a --token-file, or add --public if that is meant"
            )
        if self.client_rows_per_s is not None and not 0 < self.client_rows_per_s < math.inf:
            raise InputError(f"--client-rows-per-s {self.client_rows_per_s}: wanted a number above 0")
        if (self.tls_cert is None) != (self.tls_key is None) or (self.tls_client_ca and self.tls_cert is None):
            raise InputError(
                "--tls-cert and --tls-key go together, and --tls-client-ca with them; name the missing one"
            )

    @property
    def tls(self) -> Tls | None:
        """The files of TLS, read; None for plain text. Raises InputError."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return Tls(self.tls_cert, self.tls_key, self.tls_client_ca)

    @property
    def state_folder(self) -> Path:
        """Where collections and results are kept."""
        if self.collections is not None:
            return self.collections
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "dinoscope" / "server"

    @property
    def sample_data(self) -> str | None:
        """What the collection `samples` is built from."""
        if self.samples is not None:
            return None if self.samples == "none" else self.samples
        bundled = REPOSITORY / "samples" / "samples.csv"
        return str(bundled) if bundled.is_file() else None

    @property
    def allowed_data(self) -> dict[str, str]:
        """--evaluation-data as name -> path. Raises InputError."""
        pairs: dict[str, str] = {}
        for text in self.evaluation_data:
            name, equals, path = text.partition("=")
            if not equals or not path or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
                raise InputError(f"--evaluation-data {text}: wanted NAME=PATH, NAME of letters, digits, '-' and '_'")
            if name in pairs:
                raise InputError(
                    f"--evaluation-data {text}: {name!r} is {pairs[name]} already; give each set a name of its own"
                )
            pairs[name] = path
        return pairs


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
