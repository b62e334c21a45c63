"""What schemathesis cannot guess from the page: what images look like, and which names exist. Loaded by it, in its own environment.

Some values are replaced and some are left as they were made, so that both what exists and what does not is asked for.
"""

import base64
import zlib
from typing import Any

import schemathesis
from hypothesis import strategies

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mNQcGiAowMNDnDEMLQkAD57TAETPxtxAAAAAElFTkSuQmCC"
)
INFER = {
    "name": "image",
    "datatype": "BYTES",
    "shape": [1],
    "data": [base64.b64encode(PNG).decode()],
    "parameters": {"content_type": "base64"},
}
NAMES = {"model": "embedding", "version": "1", "name": "photos"}

images = strategies.one_of(strategies.just(PNG), strategies.binary(max_size=200))
schemathesis.openapi.format("binary", images)
schemathesis.openapi.media_type("image/*", images)
schemathesis.openapi.media_type("application/octet-stream", images)


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Two of three times a name that exists; a model or a collection of that name, a version, never a shared memory region."""
    path = context.operation.path
    if path_parameters is None:
        return None
    for name in path_parameters:
        known = "depth" if path.startswith("/v2/repository") else NAMES.get(name)
        made = str(path_parameters[name]).encode(errors="replace")
        if known is not None and zlib.crc32(made) % 3:
            path_parameters[name] = known
    return path_parameters


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """One of three times an inference that a model can make."""
    if context.operation.path.endswith("/infer") and isinstance(body, dict) and not zlib.crc32(repr(body).encode()) % 3:
        return body | {"inputs": [INFER], "outputs": []}
    return body
