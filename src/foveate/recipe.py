"""Recipe: which method serves prefill, which decode, which decides what the cache keeps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from . import registry
from .errors import ConfigError, nearest
from .methods.base import Method

ROLES = ("prefill", "decode", "cache")


@dataclass(frozen=True)
class Recipe:
    """A composition, checked when it is built. Fields take a `Method` or text such as "flexprefill@8k:gamma=0.9".

    `heads` is a method that assigns heads (DuoAttention and its like) and serves whatever phases it can for its own.
    `compress_at`: "end" compresses once, at the first single-token step after a prompt; "chunk" after every
    multi-token call, which keeps a running budget and lowers the peak; methods that need every entry of the prompt
    then run dense from the second chunk on, and say so. `storage`: "dense" rectangles, "paged" pools whose pages
    forks and beams share until they write, or "offload", rectangles in host memory.
    """

    prefill: Method | str | None = None
    decode: Method | str | None = None
    cache: Method | str | None = None
    heads: Method | str | None = None
    compress_at: str = "end"
    storage: str = "dense"
    name: str | None = None

    def __post_init__(self) -> None:
        for role in (*ROLES, "heads"):
            value = getattr(self, role)
            if isinstance(value, str):
                value = registry.parse(value)
                object.__setattr__(self, role, value)
            if value is None:
                continue
            if not isinstance(value, Method):
                raise ConfigError(f"{role}: expected a Method or its text, got {type(value).__name__}")
            if role not in value.roles:
                serves = ", ".join(value.roles)
                raise ConfigError(f"{role}: {value.id} cannot serve as {role}; it serves as {serves}")
        for option, known in (("compress_at", ("end", "chunk")), ("storage", ("dense", "paged", "offload"))):
            if (value := getattr(self, option)) not in known:
                raise ConfigError(f"{option}: expected {' or '.join(map(repr, known))}, got {value!r}")
        if self.heads is not None:
            for method in (self.prefill, self.decode):
                if hasattr(method, "attend"):
                    who = method.id  # type: ignore[union-attr]
                    raise ConfigError(
                        f"heads: {who} computes all heads itself and cannot leave some of them to another method"
                    )
        for role in (*ROLES, "heads"):
            method = getattr(self, role)
            if method is not None and (why := method.refuses(self)) is not None:
                raise ConfigError(f"{role}: {method.id} does not fit this recipe: {why}")

    @staticmethod
    def of(recipe: Recipe | Method | str) -> Recipe:
        """A recipe from a recipe, a method, or text.

        Text is methods joined by "+", each with an optional "role=" in front; without one a method takes every
        role it can serve that no other part names: "flexprefill@8k+quest+cache=snapkv".
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Method):
            return Recipe(**_roles([(None, recipe)]), name=recipe.id)
        if not isinstance(recipe, str) or not recipe.strip():
            raise ConfigError(f"recipe: expected a Recipe, a Method or text, got {recipe!r}")
        parts: list[tuple[str | None, Method]] = []
        for piece in recipe.split("+"):
            if not piece.strip():
                raise ConfigError(f"recipe {recipe!r}: expected a method on both sides of every '+', got none")
            head, eq, rest = piece.partition("=")
            role = head.strip() if eq and ":" not in head and "@" not in head else None
            if role is not None and role not in (*ROLES, "heads"):
                known = (*ROLES, "heads")
                raise ConfigError(
                    f"recipe {recipe!r}: unknown role {role!r}{nearest(role, known)}; known: {', '.join(known)}"
                )
            parts.append((role, registry.parse(rest if role else piece)))
        return Recipe(**_roles(parts), name=recipe.strip())

    @cached_property
    def methods(self) -> list[Method]:
        """The distinct methods of this recipe."""
        out: list[Method] = []
        for role in (*ROLES, "heads"):
            method = getattr(self, role)
            if method is not None and method not in out:
                out.append(method)
        return out

    @property
    def stored(self) -> dict[str, Any]:
        """How entries are stored: the cache policy's word, or {"kind": storage}."""
        asked = {} if self.cache is None else self.cache.storage()  # type: ignore[union-attr]
        return asked or {"kind": self.storage}

    @property
    def evicts(self) -> bool:
        """The cache policy drops entries."""
        return self.cache is not None and not self.cache.keeps_all  # type: ignore[union-attr]

    @property
    def extends(self) -> bool:
        """Every phase keeps its distances inside the model's range, so that prompts may be longer than it."""
        return all(m is not None and m.extends for m in (self.prefill, self.decode))  # type: ignore[union-attr]

    @property
    def decode_only(self) -> bool:
        """Nothing of this recipe is to be seen in a single forward over a text: that is dense attention."""
        plain = [m is None or m.id == "dense" for m in (self.prefill, self.decode, self.heads)]  # type: ignore[union-attr]
        stored = self.cache is not None and self.cache.id != "dense"  # type: ignore[union-attr]
        return plain[0] and plain[2] and (not plain[1] or stored)

    def describe(self) -> str:
        """Every role with every hyperparameter."""
        return " + ".join(f"{r}={m.describe()}" for r in (*ROLES, "heads") if (m := getattr(self, r)) is not None) or "dense"

    def __str__(self) -> str:
        return self.name or self.describe()


def _roles(parts: list[tuple[str | None, Method]]) -> dict[str, Method]:
    named: dict[str, Method] = {}
    for role, method in parts:
        if role is not None:
            if role in named:
                raise ConfigError(f"recipe: {role} is given twice ({named[role].id} and {method.id})")
            named[role] = method
    for role, method in parts:
        if role is None:
            free = [r for r in method.default_roles if r not in named]
            if not free:
                taken = ", ".join(f"{r}={named[r].id}" for r in method.default_roles)
                raise ConfigError(f"recipe: nothing left to do for {method.id}; already taken: {taken}")
            named.update({r: method for r in free})
    return named
