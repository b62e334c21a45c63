"""What was asked for, a published protocol's settings and defaults in, one Spec out: in this order the first that says something wins.

So a setting that is given wins over `--preset` even at its default value, in Python, on a command line and in a request alike.
Read in this order: settled_by, check_words, as_typed, check_preset, evaluator_cli.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from data.errors import InputError
from evaluators.classification import summary

SpecClass = TypeVar("SpecClass", bound=type)
Spec = TypeVar("Spec")
Settings = Mapping[str, Any]


def settled_by(
    presets: Mapping[str, Settings], otherwise: Callable[[Settings], Settings] = lambda _: {}
) -> Callable[[SpecClass], SpecClass]:
    """Decorate a dataclass with a field `preset`: what its caller leaves out comes from the preset named, then from the defaults.

    `otherwise`, given what the caller said, tells defaults that hang on other settings; a preset wins over them.
    """

    def decorate(spec_class: SpecClass) -> SpecClass:
        plain = spec_class.__init__  # type: ignore[misc]

        @functools.wraps(plain)
        def settle(self: Any, **given: Any) -> None:
            name = given.get("preset")
            if name is not None and name not in presets:
                raise InputError(f"--preset {name}: wanted {' or '.join(presets)}")
            chosen = presets[name] if name is not None else {}
            object.__setattr__(self, "_given", frozenset(given))
            plain(self, **{**otherwise(given), **chosen, **given})

        spec_class.__init__ = settle  # type: ignore[misc]
        return spec_class

    return decorate


def check_words(spec: object) -> None:
    """Raise InputError where a setting is none of the words that its type allows: in Python no parser has looked at them."""
    for name, kind in get_type_hints(type(spec)).items():
        words = _allowed(kind)
        value = getattr(spec, name)
        if words and value not in words and not (value is None and type(None) in get_args(kind)):
            raise InputError(f"--{name.replace('_', '-')} {value}: wanted {' or '.join(words)}")


def check_preset(spec_class: type, words: Sequence[str], evaluator: str) -> None:
    """Raise InputError, with those there are, where a command line names a preset that the evaluator does not have."""
    presets = _allowed(get_type_hints(spec_class).get("preset"))
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        named = value if equals else following
        if flag != "--preset" or named in (*presets, "None", ""):
            continue
        raise InputError(
            f"--preset {named}: wanted {' or '.join(presets)}"
            if presets
            else f"--preset {named}: {evaluator} has no presets, since no protocol of it was published; leave it out"
        )


def _allowed(kind: Any) -> list[str]:
    """The words of a setting's type; none where it takes others."""
    return [word for part in (kind, *get_args(kind)) if get_origin(part) is Literal for word in get_args(part)]


def was_given(spec: object, name: str) -> bool:
    """Whether whoever made the Spec gave this setting, so that nothing else has a say in it."""
    return name in getattr(spec, "_given", ())


def as_typed(spec: Spec, words: Sequence[str]) -> Spec:
    """The Spec that a command line's words give: a parser fills in every default, and those would count as given."""
    flags = {word.split("=", 1)[0].replace("_", "-") for word in words if word.startswith("--")}
    names = [field.name for field in dataclasses.fields(spec)]  # type: ignore[arg-type]
    spelt = {name: name.replace("_", "-") for name in names}
    typed = [name for name in names if flags & {f"--{spelt[name]}", f"--no-{spelt[name]}"}]
    return type(spec)(**{name: getattr(spec, name) for name in typed})


def evaluator_cli(main: Callable[..., None], words: Sequence[str] | None = None) -> None:
    """Run an evaluator's `main`, which has a parameter `spec`, with a command's words (left out: the program's own)."""
    module = inspect.getmodule(main)
    assert module is not None
    given = list(sys.argv[1:] if words is None else words)

    @functools.wraps(main)
    def typed(*args: Any, **named: Any) -> None:
        call = inspect.signature(main).bind(*args, **named)
        call.arguments["spec"] = as_typed(call.arguments["spec"], given)
        main(*call.args, **call.kwargs)

    name = (module.__spec__.name if module.__spec__ else module.__name__).rsplit(".", 1)[-1]
    # the parser would draw a box of several lines
    check_preset(get_type_hints(main)["spec"], given, name)
    tyro.cli(typed, args=given, prog=f"python -m evaluators.{name}", description=summary(module.__doc__))
