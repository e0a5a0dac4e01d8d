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
    "xattention": "foveate.methods.xattention:XAttention",
    "anchor_attention": "foveate.methods.anchor_attention:AnchorAttention",
    "quest": "foveate.methods.quest:Quest",
    "snapkv": "foveate.methods.snapkv:SnapKV",
    "expected_attention": "foveate.methods.expected_attention:ExpectedAttention",
    "spargeattn": "foveate.methods.spargeattn:SpargeAttn",
    "deltallm": "foveate.methods.deltallm:DeltaLLM",
    "topk_exact": "foveate.methods.topk_exact:TopKExact",
    "s2_strided": "foveate.methods.s2_strided:S2Strided",
    "hyperattention": "foveate.methods.hyperattention:HyperAttention",
    "hip": "foveate.methods.hip:HiP",
    "seerattention": "foveate.methods.seerattention:SeerAttention",
    "duo_attention": "foveate.methods.duo_attention:DuoAttention",
    "sale": "foveate.methods.sale:SALE",
    "qwen1m": "foveate.methods.qwen1m:Qwen1M",
    "act": "foveate.methods.act:ACT",
    "moa": "foveate.methods.moa:MoA",
    "lserve": "foveate.methods.lserve:LServe",
    "h2o": "foveate.methods.h2o:H2O",
    "pyramidkv": "foveate.methods.pyramidkv:PyramidKV",
    "adakv": "foveate.methods.adakv:AdaKV",
    "razor_attention": "foveate.methods.razor_attention:RazorAttention",
    "dsa": "foveate.methods.dsa:DSA",
    "kivi": "foveate.methods.kivi:KIVI",
    "think": "foveate.methods.think:ThinK",
    "double_sparsity": "foveate.methods.double_sparsity:DoubleSparsity",
    "adamas": "foveate.methods.adamas:Adamas",
    "tidal_decode": "foveate.methods.tidal_decode:TidalDecode",
    "recycled_attention": "foveate.methods.recycled_attention:RecycledAttention",
    "token_select": "foveate.methods.token_select:TokenSelect",
    "longheads": "foveate.methods.longheads:LongHeads",
    "speckv": "foveate.methods.speckv:SpecKV",
    "pillar_attn": "foveate.methods.pillar_attn:PillarAttn",
    "retrieval_attention": "foveate.methods.retrieval_attention:RetrievalAttention",
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
    name, at, preset = (part.strip() for part in head.partition("@"))
    if not name:
        raise ConfigError(f"method {text!r}: expected an id, such as quest, got none; foveate methods lists them")
    if at and not preset:
        raise ConfigError(f"method {text!r}: expected the name of a preset after '@', got none")
    options = {}
    for item in filter(None, (part.strip() for part in tail.split(","))):
        key, eq, value = item.partition("=")
        if not eq:
            raise ConfigError(f"method {text!r}: expected key=value after ':', got {item!r}")
        if key.strip() in options:
            raise ConfigError(f"method {text!r}: {key.strip()} is given twice")
        options[key.strip()] = _literal(value.strip())
    return get(name).make(preset or None, **options)


def _literal(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
