"""Save the caches of all layers to one safetensors file and load them again: compress once, ask many times.

The file holds what the stores hold (keys, values, lengths, true positions, biases), the queries saved for a compression
still to come, and those values of the methods' `state.layer` that are tensors. Other values, such as the page bounds
of Quest, are lost; `save` returns their names. Methods compute theirs anew from the cache. Never pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CacheError
from ..methods.base import LayerState
from .dense import DenseStore
from .layer import LayerCache
from .offload import OffloadStore
from .paged import PagedStore
from .pruned import ChannelStore
from .quantised import QuantisedStore
from .ragged import RaggedStore
from .ring import RingStore
from .store import Store

FORMAT, VERSION = "foveate-cache", 1
STORES: dict[str, type[Store]] = {
    s.kind: s for s in (DenseStore, RingStore, RaggedStore, PagedStore, QuantisedStore, ChannelStore, OffloadStore)
}


def save(
    path: str | os.PathLike[str],
    layers: Sequence[LayerCache],
    fingerprint: str,
    recipe: str,
    extra: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write all layers to `path`. The file appears whole or not at all; an older one stays until then.

    Args:
        layers: the caches, one per layer. fingerprint: says which model made them; `load` demands the same text.
        recipe: the recipe's text, for `inspect`. extra: what else `inspect` is to give back, as JSON can say it.

    Returns:
        Names of method state that could not be saved (not tensors), each once.

    Raises:
        CacheError: the file could not be written.
    """
    tensors: dict[str, Tensor] = {}
    lost: dict[str, None] = {}
    described = [_describe(layer, f"{i}.", tensors, lost) for i, layer in enumerate(layers)]
    meta = {"format": FORMAT, "version": str(VERSION), "fingerprint": fingerprint, "recipe": recipe}
    meta["layers"], meta["extra"] = json.dumps(described), json.dumps(dict(extra or {}))
    target = Path(path)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        save_file(_separate(tensors), part, meta)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.replace(part, target)
    except (OSError, SafetensorError) as err:
        raise CacheError(f"path: could not write the cache to {str(target)!r}: {err}") from err
    finally:
        part.unlink(missing_ok=True)
    return list(lost)


def load(path: str | os.PathLike[str], fingerprint: str, device: torch.device | str = "cpu") -> list[LayerCache]:
    """The layers written by `save`, on `device`.

    Raises:
        CacheError: no such file, not a whole cache file, another version, or made by another model.
    """
    with _opened(path) as (file, meta):
        if meta["fingerprint"] != fingerprint:
            raise CacheError(
                f"path: {str(path)!r} was made by model {meta['fingerprint']!r}, which is not this one ({fingerprint!r})"
            )
        try:
            described = json.loads(meta["layers"])
            return [_rebuild(entry, f"{i}.", file, device) for i, entry in enumerate(described)]
        except (KeyError, ValueError, TypeError, IndexError, SafetensorError) as err:
            if isinstance(err, CacheError):
                raise
            raise CacheError(f"path: {str(path)!r} is not a complete cache file: {err}") from err


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """fingerprint, recipe, extra ({} where none was given) and per layer kind, seen and evicted, without reading the
    tensors. Raises like `load`."""
    with _opened(path) as (_, meta):
        read = {"layers": json.loads(meta["layers"]), "extra": json.loads(meta.get("extra", "{}"))}
        return {**{n: meta[n] for n in ("fingerprint", "recipe")}, **read}


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]):  # type: ignore[no-untyped-def]
    if not Path(path).is_file():
        raise CacheError(f"path: no such cache file: {str(path)!r}")
    try:
        file = safe_open(os.fspath(path), framework="pt")
    except (SafetensorError, OSError) as err:
        raise CacheError(f"path: {str(path)!r} is truncated or not a safetensors file: {err}") from err
    with file:
        meta = file.metadata() or {}
        if meta.get("format") != FORMAT:
            raise CacheError(f"path: {str(path)!r} is not a saved cache: format {meta.get('format')!r}, not {FORMAT!r}")
        if meta.get("version") != str(VERSION):
            raise CacheError(
                f"path: {str(path)!r} has version {meta.get('version')!r} of the cache format; this release reads {VERSION}"
            )
        if missing := {"fingerprint", "recipe", "layers"} - meta.keys():
            raise CacheError(f"path: {str(path)!r} is not a complete cache file: no {', '.join(sorted(missing))}")
        yield file, meta


def _describe(layer: LayerCache, prefix: str, out: dict[str, Tensor], lost: dict[str, None]) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": None, "seen": layer.seen, "pending": layer.pending, "evicted": layer.evicted}
    if layer.store is not None:
        entry["kind"] = layer.store.kind
        state = layer.store.state()
        entry["store"] = sorted(state)
        out.update({f"{prefix}store.{name}": t for name, t in state.items()})
    entry["steps"] = layer.steps
    entry["tails"] = [b for b, t in enumerate(layer.tails) if t is not None]
    out.update({f"{prefix}tail.{b}": t for b, t in enumerate(layer.tails) if t is not None})
    entry["states"] = []
    for place, values in (("batch", layer.batch), *((str(b), row) for b, row in enumerate(layer.rows))):
        for name, value in values.items():
            if not isinstance(value, Tensor) and not hasattr(value, "saved"):
                lost[name] = None
                continue
            for part, t in ({name: value} if isinstance(value, Tensor) else value.saved()).items():
                entry["states"].append([place, part])
                out[f"{prefix}state.{place}.{part}"] = t
    return entry


def _rebuild(entry: dict[str, Any], prefix: str, file: Any, device: torch.device | str) -> LayerCache:
    def read(name: str) -> Tensor:
        return file.get_tensor(prefix + name).to(device)  # type: ignore[no-any-return]

    layer = LayerCache()
    layer.seen, layer.pending, layer.evicted = list(entry["seen"]), bool(entry["pending"]), bool(entry["evicted"])
    rows, layer.fresh, layer.steps = len(layer.seen), max(layer.seen, default=0), int(entry.get("steps", 0))
    layer.rows, layer.tails = [LayerState() for _ in range(rows)], [None] * rows
    if entry["kind"] is not None:
        if entry["kind"] not in STORES:
            raise CacheError(f"path: unknown kind of store {entry['kind']!r}; known: {', '.join(STORES)}")
        layer.store = STORES[entry["kind"]].restore({name: read(f"store.{name}") for name in entry["store"]})
        if len(layer.store.lens) != rows:
            raise CacheError(f"path: a layer with {rows} rows has a store with {len(layer.store.lens)}")
    for b in entry["tails"]:
        layer.tails[b] = read(f"tail.{b}").clone()
    for place, name in entry["states"]:
        values = layer.batch if place == "batch" else layer.rows[int(place)]
        values[name] = read(f"state.{place}.{name}").clone()
    return layer


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the host, none of which shares memory with another (the format demands it)."""
    out, used = {}, set()
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        place = t.untyped_storage().data_ptr()
        out[name] = t.clone() if place in used else t
        used.add(place)
    return out
