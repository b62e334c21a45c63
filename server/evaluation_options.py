"""Settings that a client gives for an evaluator: fields of the evaluator's own Spec, by name, checked before anything starts.

    {"evaluator": "knn", "data": "mine", "options": {"k": [5, 10], "temperature": 0.1}}

They are what `python -m evaluators.NAME --help` lists with the protocol, less the flags that name files or machines.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from data.errors import InputError
from server.json_text import check_json


def spec_of(evaluator: str) -> Any:
    """The Spec that the evaluator's command reads its protocol from."""
    return get_type_hints(importlib.import_module(f"evaluators.{evaluator}").main)["spec"]


def check_options(evaluator: str, options: Mapping[str, Any]) -> None:
    """Raise InputError for a name that the Spec does not have, a value of another type, or one that the Spec itself refuses."""
    if not options:
        return
    spec = spec_of(evaluator)
    names = [one.name for one in dataclasses.fields(spec)]
    for name in options:
        if name not in names:
            raise InputError(f"options: {evaluator} has no setting {name!r:.60}; it has: {', '.join(names)}")
    check_json(options, "'options'")
    try:
        TypeAdapter(spec).validate_json(json.dumps(options), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        own = first.get("ctx", {}).get("error")
        if isinstance(own, InputError):
            raise InputError(f"options: {without_flags(str(own))}") from error
        name = str(first["loc"][0]) if first["loc"] else evaluator
        raise InputError(f"options: {name} is {options.get(name)!r:.60}; {first['msg']}") from error


def without_flags(text: str) -> str:
    """`--n-per-class` as clients of the server know it."""
    return re.sub(r"--([A-Za-z][\w-]*)", lambda found: found[1].replace("-", "_"), text)


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Checked options as words of the evaluator's command. A text stays in the word of its flag, so that it cannot be another flag."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words.append(f"--{flag}={value}")
    return words
