"""Tile sizes by what a device can hold: a small table, no search."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

SHARED = 99 * 1024  # what every card since Ampere can give one program; also the interpreter's figure
CORES = 8  # multiprocessors of an unknown device


@dataclass(frozen=True)
class Config:
    """rows: most query rows of a tile. keys: keys of a step. warps, stages: Triton's."""

    rows: int
    keys: int
    warps: int
    stages: int


def power_of_2(n: int) -> int:
    """The least power of 2 from n >= 1 on, as `triton.next_power_of_2`, whose calls cost the host microseconds."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache
def device(index: int | None) -> tuple[int, int]:
    """(bytes of shared memory one program may use, multiprocessors); None: no device, the interpreter."""
    if index is None:
        return SHARED, CORES
    p = torch.cuda.get_device_properties(index)
    return int(getattr(p, "shared_memory_per_block_optin", 64 * 1024)), p.multi_processor_count


def rows_limit(shared: int, d: int, size: int) -> int:
    """Most query rows of a tile for head dim d (padded) of `size` bytes: the accumulator must stay in registers."""
    if size == 4:
        return 64 if d <= 128 else 32
    return 128 if d <= 128 or shared > 160 * 1024 else 64


def config(shared: int, tile: int, d: int, dv: int, size: int, hops: int | None) -> Config:
    """Step for a tile of `tile` rows. Queries and `stages` steps of keys and values share the memory.

    hops: None for a tile bound by arithmetic; else it is bound by memory and its keys are found through that many
    dependent loads (a list, a page table), each of which takes a stage of the pipeline before keys can be asked for.
    """
    wide = max(d, dv)
    if hops is not None:
        keys, warps, stages = (64 if wide <= 128 else 32), 4, 3 + hops
    elif tile >= 128:
        keys, warps, stages = (128 if wide <= 128 else 64), 8, 2
    else:
        keys, warps, stages = (64 if wide <= 128 else 32), 4, 3
    if size == 4:
        keys, stages = min(keys, 32), min(stages, 2)
    ahead = stages - (hops or 0)  # steps of keys and values that are held at once
    while (tile * d + ahead * keys * (d + dv)) * size > 0.9 * shared and (keys > 16 or ahead > 1):
        if keys > 64 or (ahead == 2 and keys > 16):
            keys //= 2
        else:
            ahead -= 1
    return Config(tile, keys, warps, ahead + (hops or 0))
