"""Request parameters -> typed options: one frozen dataclass a model, read strictly."""

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from data.errors import InputError

PROTOCOL_PARAMETERS = frozenset(
    {"timeout", "priority", "sequence_id", "sequence_start", "sequence_end", "binary_data_output", "content_type"}
)
"""Parameters of the v2 protocol itself; no model sees them. `content_type` is MLServer's hint of what a client made its request from."""

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A model without parameters."""


@dataclasses.dataclass(frozen=True)
class EmbeddingOptions:
    """Parameters of `embedding`."""

    normalize: bool = False
    """Scale every embedding to length 1."""


@dataclasses.dataclass(frozen=True)
class MapOptions:
    """Parameters of `depth` and of other models that see the whole image."""

    size: int | None = None
    """Side in pixels that the image is squashed to; None: the manifest's."""


@dataclasses.dataclass(frozen=True)
class AttentionOptions(MapOptions):
    """Parameters of `attention`."""

    mass: float = 0.6
    """Share of a head's attention that its mask holds, above 0 and up to 1."""

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise InputError(f"parameter 'mass' is {self.mass}; wanted above 0 and up to 1")


@dataclasses.dataclass(frozen=True)
class KnnOptions:
    """Parameters of `knn`."""

    collection: str = "samples"
    k: int | None = None
    """Neighbours of each row; None: 5, or all where there are fewer."""
    label: str = ""
    """Search among items with this label only; empty: among all."""

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise InputError(f"parameter 'k' is {self.k}; wanted at least 1")


def read_options(kind: type[Options], parameters: Mapping[str, Any], model: str) -> Options:
    """Check names and types of a request's parameters. Numbers may also come as text. Raises InputError."""
    if not parameters:
        return kind()
    hints = _hints(kind)  # type: ignore[arg-type]  # a class is hashable
    given = {name: value for name, value in parameters.items() if not _is_protocols(name)}
    unknown = sorted(given.keys() - hints.keys())
    if unknown:
        known = f"it takes {', '.join(sorted(hints))}" if hints else "it takes none"
        raise InputError(f"model {model!r} has no parameter {unknown[0]!r}; {known}")
    return kind(**{name: _convert(name, hints[name], value) for name, value in given.items()})


def _is_protocols(name: str) -> bool:
    return name in PROTOCOL_PARAMETERS or name.startswith("triton_") or name.endswith(".format")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _convert(name: str, hint: Any, value: Any) -> Any:
    wanted = next((kind for kind in get_args(hint) if kind is not type(None)), hint)
    if wanted is bool and (isinstance(value, bool) or value in ("true", "false", 0, 1)):
        return value in (True, "true")
    if wanted is str and isinstance(value, str):
        return value
    if wanted in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if wanted is float or number.is_integer():
                return wanted(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise InputError(f"parameter {name!r} is {value!r:.80}; wanted {_WORDS[wanted]}")


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
