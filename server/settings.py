"""Where an operator's settings come from: a TOML file, the environment, flags; the later of these counts.

    models = "models/"                                             a file, named by --config or DINOSCOPE_CONFIG
    DINOSCOPE_HTTP_PORT=9000 DINOSCOPE_EVALUATION_DATA=a=/a,b=/b   the environment; several values with commas between
    python -m server --log-level debug                             flags

File and environment are turned into flags, so that every value is read and refused by the same rules.
"""

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro
from sqlalchemy.engine import make_url

from data.errors import InputError
from runtimes.connection import CLIENT_VARIABLES
from runtimes.runtime import Runtime
from server.config import ServerConfig

PREFIX = "DINOSCOPE_"
_TYPES = get_type_hints(ServerConfig)
_SERVICE_LINK = re.compile(r"\w*(_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT_\d+_\w+)")
"""What Kubernetes puts into every pod beside a service of this name; DINOSCOPE_PORT=tcp://... too."""
_FIELDS = {one.name: one for one in dataclasses.fields(ServerConfig)}


def read_settings(argv: Sequence[str], environment: Mapping[str, str]) -> ServerConfig:
    """The configuration of a server. Raises InputError; unknown flags end the process as tyro does it."""
    from_environment = _environment(environment)
    file = _named_file(argv) or from_environment.get("config")
    from_file = {} if file is None else _file(Path(str(file)))
    where = {name: f"--config {file}: {name}" for name in from_file}
    where |= {name: f"{PREFIX}{name.upper()}" for name in from_environment}
    values = {name: value for name, value in {**from_file, **from_environment}.items() if not _given(argv, name)}
    for name, value in values.items():
        _check(name, value, where[name])
    flags = [word for name, value in values.items() for word in _flag(name, value)]
    config = tyro.cli(ServerConfig, prog="python -m server", args=[*flags, *argv])
    try:
        config.check()
    except InputError as error:  # it speaks of a flag, which nobody may have given
        name = str(error).split()[0].removeprefix("--").replace("-", "_")
        if name not in values:
            raise
        raise InputError(f"{where[name]}: {error}") from error
    return config


def _environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, text in environment.items():
        name = key.removeprefix(PREFIX).lower()
        if not key.startswith(PREFIX) or key in CLIENT_VARIABLES:
            continue
        if name not in _FIELDS and (_SERVICE_LINK.fullmatch(key) or (key.endswith("_PORT") and "://" in text)):
            continue
        if name not in _FIELDS:
            raise InputError(f"{key}: there is no such setting; python -m server --help lists them")
        found[name] = text.split(",") if _holds_several(name) else text
    return found


def _file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read ({error}); wanted TOML such as http_port = 9000") from error
    for name, value in values.items():
        if name not in _FIELDS or name == "config":
            raise InputError(f"--config {path}: {name!r} is no setting; python -m server --help lists them")
        if isinstance(value, dict) or isinstance(value, list) != _holds_several(name):
            raise InputError(
                f"--config {path}: {name} is {value!r:.60}; wanted {'a list' if _holds_several(name) else 'one value'}"
            )
    return values


def _check(name: str, value: Any, where: str) -> None:
    """Raise InputError, naming where it came from, for what the flag would refuse: its refusal would name a flag that nobody gave."""
    hint = _TYPES[name]
    kinds = get_args(hint) or (hint,)
    if value == "None" and type(None) in kinds:
        return
    if value in ("", [""]):  # as `VARIABLE: ${UNSET}` leaves it; a folder of no name would be the one at hand
        raise InputError(f"{where} is empty; give it a value, or leave it out")
    if bool in kinds and str(value).lower() not in ("true", "false", "1", "0"):
        raise InputError(f"{where} is {value!r:.40}; wanted true or false")
    if get_origin(hint) is Literal and value not in kinds:
        raise InputError(f"{where} is {value!r:.40}; wanted {', '.join(kinds[:-1])} or {kinds[-1]}")
    for number, wanted in ((int, "a whole number"), (float, "a number")):
        if number in kinds:
            try:
                number(str(value))
            except ValueError as error:
                raise InputError(f"{where} is {value!r:.40}; wanted {wanted}") from error


def _holds_several(name: str) -> bool:
    return isinstance(_FIELDS[name].default, tuple)


def _named_file(argv: Sequence[str]) -> str | None:
    for at, word in enumerate(argv):
        if word == "--config" and at + 1 < len(argv):
            return argv[at + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None


def _given(argv: Sequence[str], name: str) -> bool:
    """Whether a flag of this setting is on the command line."""
    words = {word.partition("=")[0].replace("_", "-") for word in argv}
    flag = name.replace("_", "-")
    return bool(words & {f"--{flag}", f"--no-{flag}"})


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(_FIELDS[name].default, bool):
        return [f"--{flag}" if str(value).lower() in ("true", "1") else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value)] if isinstance(value, list) else [f"--{flag}={value}"]


def resolved(config: ServerConfig, runtimes: Sequence[Runtime]) -> dict[str, Any]:
    """Every setting as it counts, for the log, with what was chosen for those left out; the password of the database is not shown."""
    chosen = {"instances": len(runtimes), "threads": runtimes[0].threads, "device": runtimes[0].device}
    values = json.loads(json.dumps(dataclasses.asdict(config) | chosen, default=str))
    if config.database is not None:
        values["database"] = make_url(config.database).render_as_string(hide_password=True)
    return values
