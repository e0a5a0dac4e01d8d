"""Every method by its id. Adding one: its file, a line here, a row in tests/test_methods.py."""

from __future__ import annotations

import importlib
from functools import cache

from .errors import ConfigError, nearest
from .methods.base import Method

METHODS = {
    "dense": "foveate.methods.dense:Dense",
    "streaming_llm": "foveate.methods.streaming_llm:StreamingLLM",
    "minference": "foveate.methods.minference:MInference",
    "flexprefill": "foveate.methods.flexprefill:FlexPrefill",
    "quest": "foveate.methods.quest:Quest",
    "snapkv": "foveate.methods.snapkv:SnapKV",
    "expected_attention": "foveate.methods.expected_attention:ExpectedAttention",
}


@cache
def get(name: str) -> type[Method]:
    """The class of a method id. Raises ConfigError with the nearest known id."""
    if name not in METHODS:
        raise ConfigError(f"method: unknown id {name!r}{nearest(name, METHODS)}; known: {', '.join(METHODS)}")
    module, _, attr = METHODS[name].partition(":")
    cls = getattr(importlib.import_module(module), attr)
    assert issubclass(cls, Method) and cls.id == name, f"{METHODS[name]} has id {cls.id!r}, not {name!r}"
    return cls  # type: ignore[no-any-return]


def parse(text: str) -> Method:
    """A method from `id`, `id@preset`, `id:key=value,...` or `id@preset:key=value,...`."""
    head, _, tail = text.strip().partition(":")
    name, _, preset = head.partition("@")
    options = {}
    for item in filter(None, (part.strip() for part in tail.split(","))):
        key, eq, value = item.partition("=")
        if not eq:
            raise ConfigError(f"method {text!r}: expected key=value after ':', got {item!r}")
        if key.strip() in options:
            raise ConfigError(f"method {text!r}: {key.strip()} is given twice")
        options[key.strip()] = _literal(value.strip())
    return get(name.strip()).make(preset.strip() or None, **options)


def _literal(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
