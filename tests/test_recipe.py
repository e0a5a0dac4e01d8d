"""Recipes: the text form, roles, presets, and what is refused when a recipe is built, with which words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import registry
from foveate.errors import ConfigError
from foveate.methods.base import Method, option
from foveate.methods.dense import Dense
from foveate.methods.streaming_llm import StreamingLLM
from foveate.recipe import Recipe

ROLES = ("prefill", "decode", "cache", "heads")
EVERY = [registry.get(name) for name in registry.METHODS]
every_method = pytest.mark.parametrize("cls", EVERY, ids=list(registry.METHODS))


@dataclass(frozen=True)
class Picky(Method):
    """A method with every kind of hyperparameter, which goes with no cache policy."""

    size: int = option(4, low=1, high=64)
    part: float = option(0.5, low=0.0, high=1.0)
    least: int | None = option(None, low=1)
    kind: str = option("max", choices=("max", "mean"))
    on: bool = option(True)

    id: ClassVar[str] = "picky"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "heads")
    presets: ClassVar[dict] = {"small": {"size": 2, "kind": "mean"}}

    @property
    def default_roles(self):
        return ("prefill",)

    def refuses(self, recipe):
        return "it needs every entry" if recipe.evicts else None


@pytest.fixture(autouse=True)
def _picky(monkeypatch):
    """Picky beside the methods that exist, for these tests alone."""
    monkeypatch.setitem(registry.METHODS, "picky", "tests.test_recipe:Picky")
    yield
    registry.get.cache_clear()


# ---------------------------------------------------------------------- text
def test_a_method_alone_takes_its_own_roles():
    recipe = Recipe.of("streaming_llm")
    assert recipe.prefill == recipe.decode == recipe.cache == StreamingLLM() and recipe.heads is None
    assert recipe.methods == [StreamingLLM()] and recipe.evicts
    assert Recipe.of("picky").prefill.id == "picky" and Recipe.of("picky").heads is None
    assert Recipe.of(StreamingLLM(window=9)).decode.window == 9
    assert Recipe.of(recipe) is recipe
    assert not Recipe.of("dense").evicts and not Recipe().evicts


def test_named_roles_come_first_and_the_rest_is_filled():
    recipe = Recipe.of(" streaming_llm:window=8 + cache=dense + decode = streaming_llm@8k:sink=2 ")
    assert recipe.prefill == StreamingLLM(window=8)
    assert recipe.decode == StreamingLLM(sink=2, window=1020)
    assert recipe.cache == Dense()
    assert str(recipe) == "streaming_llm:window=8 + cache=dense + decode = streaming_llm@8k:sink=2"
    assert [m.id for m in recipe.methods] == ["streaming_llm", "streaming_llm", "dense"]
    both = Recipe.of("heads=picky+dense")
    assert both.heads == Picky() and both.prefill == Dense()


def test_fields_take_text_too():
    recipe = Recipe(prefill="picky@small:size=3", decode=Dense())
    assert recipe.prefill == Picky(size=3, kind="mean") and recipe.decode == Dense() and recipe.cache is None


@given(
    st.integers(1, 64),
    st.floats(0, 1, allow_nan=False),
    st.none() | st.integers(1, 10**9),
    st.sampled_from(["max", "mean"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_a_description_is_a_text_of_the_same_method(size, part, least, kind, on):
    method = Picky(size=size, part=part, least=least, kind=kind, on=on)
    cut = method.describe().replace("e+", "e")  # "+" joins methods; 1e+20 and 1e20 are one number
    assert Recipe.of(cut).prefill == method
    assert Recipe.of(f"heads={cut}").heads == method
    assert method.describe() in Recipe.of(method).describe()


@every_method
def test_every_method_of_the_registry(cls):
    """Its description and each preset are texts of it, it serves the roles it declares, and no other."""
    method = cls()
    assert registry.parse(cls.id) == method
    if all(f.type != "Profile | None" for f in dataclasses.fields(cls)):
        assert registry.parse(method.describe()) == method
    assert set(cls.roles) <= set(ROLES) and set(method.default_roles) <= set(cls.roles) and method.default_roles
    for preset, values in cls.presets.items():
        made = registry.parse(f"{cls.id}@{preset}")
        assert made == cls(**values) and made != method
    for role in ROLES:
        if role in cls.roles:
            assert getattr(Recipe.of(f"{role}={cls.id}"), role) == method
        else:
            with pytest.raises(ConfigError, match=rf"{role}: {cls.id} cannot serve as {role}; it serves as "):
                Recipe.of(f"{role}={cls.id}")


@every_method
def test_hyperparameters_are_checked(cls):
    """Wrong types and values out of range name the method, the hyperparameter, what came and what was expected."""
    for f in dataclasses.fields(cls):
        low, high = f.metadata.get("range", (None, None))
        for value in ([low - 1] if low is not None else []) + ([high + 1] if high is not None else []):
            with pytest.raises(ConfigError, match=rf"{cls.id}: {f.name} expected .*got {value}"):
                cls(**{f.name: value})
        if f.metadata.get("choices"):
            with pytest.raises(ConfigError, match=rf"{cls.id}: {f.name} expected one of .*got 'nothing'"):
                cls(**{f.name: "nothing"})
        elif str(f.type) in ("int", "float", "bool", "int | None"):
            with pytest.raises(ConfigError, match=rf"{cls.id}: {f.name} expected {f.type.replace('|', '.')}, got 'x'"):
                cls(**{f.name: "x"})
    if (names := [f.name for f in dataclasses.fields(cls)]) and len(names[0]) > 3:
        with pytest.raises(ConfigError, match=rf"unknown hyperparameter '{names[0]}s'; did you mean '{names[0]}'\?"):
            registry.parse(f"{cls.id}:{names[0]}s=1")


# ---------------------------------------------------------------------- refusals
REFUSED = {
    "unknown method": ("streamingllm", r"unknown id 'streamingllm'; did you mean 'streaming_llm'\?; known: dense, "),
    "nothing near": ("xyzzy", r"unknown id 'xyzzy'; known: dense, "),
    "unknown preset": ("picky@smal", r"picky: unknown preset 'smal'; did you mean 'small'\?; known: small"),
    "no presets": ("dense@8k", "dense: unknown preset '8k'; known: none"),
    "unknown hyperparameter": ("picky:sizes=3", r"unknown hyperparameter 'sizes'; did you mean 'size'\?; known: size, "),
    "no hyperparameters": ("dense:size=3", "dense: unknown hyperparameter 'size'; known: none"),
    "unknown role": ("prefil=picky", "unknown role 'prefil'; did you mean 'prefill'"),
    "wrong type": ("picky:size=big", r"picky: size expected int, got 'big' \(str\)"),
    "float for int": ("picky:size=2.5", r"picky: size expected int, got 2.5 \(float\)"),
    "bool for int": ("picky:size=true", r"picky: size expected int, got True \(bool\)"),
    "int for bool": ("picky:on=1", r"picky: on expected bool, got 1 \(int\)"),
    "number for text": ("picky:kind=3", r"picky: kind expected str, got 3"),
    "none": ("picky:size=none", r"picky: size expected int, got None"),
    "too small": ("picky:size=0", "picky: size expected between 1 and 64, got 0"),
    "too large": ("picky:part=1.01", r"picky: part expected between 0.0 and 1.0, got 1.01"),
    "optional too small": ("picky:least=0", "picky: least expected >= 1, got 0"),
    "not a number": ("picky:part=nan", "picky: part expected between 0.0 and 1.0, got nan"),
    "infinite": ("picky:part=inf", "picky: part expected between"),
    "no such choice": ("picky:kind=min", "picky: kind expected one of max, mean, got 'min'"),
    "no value": ("picky:size", "expected key=value after ':', got 'size'"),
    "role it cannot serve": ("decode=picky", "decode: picky cannot serve as decode; it serves as prefill, heads"),
    "role twice": ("prefill=picky+prefill=dense", "prefill is given twice .picky and dense."),
    "nothing left": ("prefill=dense+picky", "nothing left to do for picky; already taken: prefill=dense"),
    "twice the same": ("dense+dense", "nothing left to do for dense"),
    "does not fit": ("picky+cache=streaming_llm", "prefill: picky does not fit this recipe: it needs every entry"),
    "heads do not fit": ("heads=picky+cache=streaming_llm", "heads: picky does not fit this recipe: it needs every entry"),
    "empty": ("  ", "recipe: expected a Recipe, a Method or text"),
    "empty part": ("dense+", r"recipe 'dense\+': expected a method on both sides of every '\+', got none"),
    "role alone": ("decode=", "method '': expected an id, such as quest, got none"),
    "options alone": ("prefill=:size=3", "method ':size=3': expected an id"),
    "no preset": ("picky@", "method 'picky@': expected the name of a preset after '@', got none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_text(case):
    text, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        Recipe.of(text)


def test_refused_objects():
    for wrong in (None, 3, ["dense"], Dense):
        with pytest.raises(ConfigError, match="recipe: expected a Recipe, a Method or text"):
            Recipe.of(wrong)
    for wrong in (3, Dense, object()):
        with pytest.raises(ConfigError, match="prefill: expected a Method or its text, got"):
            Recipe(prefill=wrong)
    with pytest.raises(ConfigError, match="decode: picky cannot serve as decode"):
        Recipe(decode=Picky())
    with pytest.raises(ConfigError, match="does not fit this recipe"):
        Recipe(prefill=Picky(), cache=StreamingLLM())
    with pytest.raises(ConfigError, match="compress_at: expected 'end' or 'chunk', got 'always'"):
        Recipe(compress_at="always")
    assert Recipe(prefill=Picky(), cache=Dense()).prefill == Picky()


def test_recipes_do_not_change():
    recipe = Recipe.of("dense")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.prefill = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.prefill.size = 3


def test_a_policy_that_keeps_every_entry_does_not_evict():
    assert not Recipe.of("dense+cache=kivi").evicts and Recipe.of("dense+cache=kivi").decode_only
    assert Recipe.of("cache=think:capacity=64").evicts and not Recipe.of("cache=think").evicts
    assert Recipe.of("decode=dsa+cache=kivi").cache.id == "kivi"


def test_heads_share_no_layer_with_arithmetic_of_another_kind():
    with pytest.raises(ConfigError, match="hyperattention computes all heads itself"):
        Recipe.of("hyperattention+heads=duo_attention")
