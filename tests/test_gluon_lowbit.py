"""The Gluon kernel of low-bit logits without a GPU: its source under the emulator against plain code, its compilation."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from foveate import lists
from foveate.kernels import gluon
from foveate.kv import KV
from foveate.scores import lowbit
from foveate.scores.lowbit import Grid, anchor_lse, key_peaks, low_bit, relative_blocks
from tests import gluon_emulator as emulator
from tests.estimate_cases import draw
from tests.estimate_lowbit_cases import check_limit

try:
    from foveate.kernels.gluon import lowbit as hopper
    from foveate.kernels.gluon.shim import TensorDescriptor
except (ImportError, AttributeError):  # no Triton, or one whose Gluon the shim does not know
    hopper = None

KERNEL = emulator.load_kernel(Path(gluon.__file__).parent / "lowbit_kernel.py")
SHARED = 232_448  # bytes of shared memory a CTA may have on Hopper


@pytest.fixture(autouse=True)
def needs_gluon():
    if hopper is None:
        pytest.skip(gluon._missing() or "no Gluon")


# ---------------------------------------------------------------------- what it refuses
@pytest.mark.parametrize("call,reason", [
    (dict(width=256), "64 and 128 channels, not 256"),
    (dict(block_k=64), "32 keys, not 64 and 64"),
    (dict(block_q=48), "not 48 and 32"),
    (dict(share="token"), "by fragments, not by token"),
    (dict(n=100), "not 100"),
    ({}, "needs a Hopper GPU"),
])  # fmt: skip
def test_refuses_with_a_reason(call, reason):
    call = dict(n=256, width=128, block_q=64, block_k=32, share="fragment") | call
    assert reason in hopper.why_not(torch.zeros(2, call.pop("n"), 64), **call)


# ---------------------------------------------------------------------- its source on the CPU
def quantised(k, centre, mean, scale, bits, width):
    """What `quantise_keys` makes of keys: levels, steps, products with the mean queries."""
    g, m, d = k.shape
    x = k.float() if centre is None else k.float() - centre[:, None]
    peak = key_peaks(x, "fragment")
    step = torch.where(peak > 0, peak / (2 ** (bits - 1) - 1), 1)
    wide = -(-m // 256) * 256
    ints = torch.zeros(g, wide, width)
    ints[:, :m, :d] = low_bit(x, peak, bits) / step[..., None]
    assert bool((ints[:, :m, :d] - ints[:, :m, :d].round()).abs().max() < 1e-5)
    extra = (mean.unflatten(0, (g, -1)) @ x.transpose(-1, -2) * scale / step[:, None]).flatten(0, 1)
    steps, extras = torch.ones(g, wide), torch.zeros(len(mean), wide)
    steps[:, :m], extras[:, :m] = step, extra
    return ints.round().to(hopper.levels(bits)), steps, extras


def local_sums(q, k, centre, sizes, *, start, scale, softcap):
    (h, n, d), g, (bq, *spans) = q.shape, k.shape[0], sizes
    first, nq = start // bq, (start + n - 1) // bq - start // bq + 1
    rows = torch.zeros(h, nq * bq, d)
    rows[:, start - first * bq :][:, :n] = q
    keys = k.float() if centre is None else k.float() - centre[:, None]
    block = torch.arange(first, first + nq)
    lse = anchor_lse(rows.unflatten(0, (g, -1)), keys, block, Grid(bq, 32, *spans), scale, softcap)
    return lse.flatten(-2).flatten(0, 1)


def block_bits(q, k, centre, mean, bar, words, sizes, block_k, *, start, scale, share, bits):
    assert block_k == 32 and share == "fragment" and int(words.abs().sum()) == 0
    keys = quantised(k, centre, mean, scale, bits, 128 if q.shape[-1] > 64 else 64)
    how = dict(sizes=sizes, start=start, scale=scale, bits=bits)
    grid, args, options = hopper.arguments(q.contiguous(), mean, bar.contiguous(), keys, words, **how)
    given = [
        emulator.Descriptor(a.base, a.block_shape) if isinstance(a, TensorDescriptor)
        else emulator.Pointer(a.view(-1)) if isinstance(a, torch.Tensor) else a for a in args
    ]  # fmt: skip
    options = {k: v for k, v in options.items() if k not in ("num_warps", "maxnreg", "enable_fp_fusion")}
    emulator.launch(KERNEL.lowbit_kernel, grid, *given, **{**options, "FLAT": None, "ACC": torch.float32})


def bit_lists(words, spans, many, width, unit):
    b, h, rows, _ = words.shape
    hit = (words[..., None].long() >> torch.arange(32) & 1).flatten(-2)[..., :width] != 0
    j, (sure, free, end) = torch.arange(width), spans[..., None].unbind(1)
    keep = ((j < sure) | (hit & (j < free)) | (j >= free)) & (j < end)
    index, count = lists.compact(keep.unflatten(1, (many, -1)).any(2))
    return index * unit, count


EMULATED = SimpleNamespace(
    HELD=1 << 24, selects=lambda *args: True, means=lambda x: x.float().mean(1), local_sums=local_sums,
    block_bits=block_bits, bit_lists=bit_lists,
)  # fmt: skip


@pytest.mark.parametrize("shape,grid,tau,stages,options", [
    ((2, 1, 1700, 0, 64), Grid(64, 32, 32, 256, 128), 0.1, 8, {}),  # two words of a block
    ((4, 2, 700, 300, 40), Grid(128, 32, 64, 64, 64), 0.3, 2, {"group": True}),  # a chunk that begins inside a block
    ((2, 2, 520, 0, 72), Grid(32, 32, 32, 32, 32), 0.5, 4, {"bits": 6}),  # int8, channels that are no power of two
    ((1, 1, 600, 7, 64), Grid(16, 32, 0, 40, 96), 1.0, 2, {"softcap": 20.0, "bits": 3}),
])  # fmt: skip
def test_under_the_emulator(shape, grid, tau, stages, options, monkeypatch):
    """The lists of the plain code, index by index, with several rounds of the ring."""
    h, g, m, start, d = shape
    q, k = draw(1, h, m, d), draw(1, g, m, d, seed=1)
    k[:, :, m // 2] *= 5
    k[..., d // 3] += 3
    q = (q + 0.7 * k[:, :, m // 3].repeat_interleave(h // g, 1)[:, :, None])[:, :, start:]
    log_tau = torch.linspace(0.5, 1.5, h).mul(tau).log()
    args = dict(start=start, scale=d**-0.5) | options
    want, many = relative_blocks(q, KV.dense(k, k), log_tau, grid, **args)
    most = relative_blocks(q, KV.dense(k, k), log_tau - 60, grid, **args)[1]
    least = relative_blocks(q, KV.dense(k, k), log_tau + 60, grid, **args)[1]
    monkeypatch.setattr(lowbit.fused, "lowbit", lambda t: EMULATED)
    monkeypatch.setattr(hopper, "STAGES", stages)
    got, count = relative_blocks(q, KV.dense(k, k), log_tau, grid, **args)
    assert 0.2 < float((count.sum() - least.sum()) / (most.sum() - least.sum())) < 0.8
    assert torch.equal(count, many)
    used = torch.arange(want.shape[-1]) < many[..., None]
    assert torch.equal(got[..., : want.shape[-1]] * used, want * used)


def test_the_largest_sums_under_the_emulator():
    assert 0.01 < check_limit(block_bits, 256) < 0.9


# ---------------------------------------------------------------------- compilation
@pytest.mark.parametrize("bits,d", [(4, 128), (6, 64)])
def test_compiles_for_hopper(bits, d, tmp_path):
    """The loop of a consumer: products of the dtype, queries in registers, few instructions a logit, no spills."""
    triton = pytest.importorskip("triton")
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not nvdisasm.exists():
        pytest.skip("this Triton ships no nvdisasm")
    from foveate.kernels.gluon.lowbit_kernel import lowbit_kernel
    from foveate.kernels.gluon.shim import compile_sm90

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    n, sizes = 1 << 17, (64, 32, 256, 128)
    keys = meta(1, n, d, dtype=hopper.levels(bits)), meta(1, n), meta(4, n)
    q, words = meta(4, n, d, dtype=torch.bfloat16), meta(4, n // 64, n // 1024, dtype=torch.int32)
    how = dict(sizes=sizes, start=0, scale=0.1, bits=bits)
    grid, args, options = hopper.arguments(q, meta(4, d), meta(4, n), keys, words, **how)
    assert grid == (n // 256, 4)
    built = compile_sm90(lowbit_kernel, args, options)
    assert built.metadata.shared <= SHARED
    (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
    sass = subprocess.run([nvdisasm, "-c", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    products = re.findall(r"\b([QI]GMMA)\.64x128x32\.\S+ R\d+, (\S+),", sass)
    assert len(products) == 2 * 4 * d // 32  # four products a warpgroup
    assert {name for name, _ in products} == {"QGMMA" if bits == 4 else "IGMMA"}
    assert all(left.startswith("R") for _, left in products)
    rounds = re.findall(r"[QI]GMMA.*?REDUX\.OR", sass, re.DOTALL)  # two steps, up to where a word leaves
    assert len(rounds) == 2  # consumers
    for text in rounds:
        names = re.findall(r"\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)[ .]", text)
        assert names.count("FFMA") == 256 and names.count("FMNMX") == 224 and names.count("FSETP") == 32
        assert names.count("I2FP") == (0 if bits == 4 else 256)
        assert len(names) < (740 if bits == 4 else 1000), "2.9 instructions a logit, of which the products leave room for 4"
        assert text.count("WARPGROUP.DEPBAR") == 4, "the products wait for each other"
        assert names.count("LDL") <= 1, "spills: 3.9 leaves one number of a thread in memory, 3.6 none"
        assert not {"STL", "ATOMG", "MEMBAR"} & set(names)
