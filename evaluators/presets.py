"""A published protocol's settings in, one's own on top of them: what `--preset` does."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

Spec = TypeVar("Spec")


def with_preset(spec: Spec, presets: Mapping[str, Spec], name: str | None) -> Spec:
    """The preset, with every setting of `spec` that was changed from its default."""
    if name is None:
        return spec
    fields = dataclasses.fields(spec)  # type: ignore[arg-type]
    changed = {field.name: getattr(spec, field.name) for field in fields if getattr(spec, field.name) != field.default}
    return dataclasses.replace(presets[name], **changed)  # type: ignore[type-var]
