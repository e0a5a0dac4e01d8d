"""Runs the Gluon kernels' Python source on the CPU: threads for partitions, real barrier phases, delayed copies.

Enough of the Gluon language to execute `foveate/kernels/gluon/kernel.py` and its siblings line by line: it shows
deadlocks, wrong phases, wrong coordinates and wrong masks without a GPU. It does not show what the compiler makes of the
source. Copies by TMA land late and in any order, those by cp.async once they were waited for and fenced, products read
shared memory when they are waited for, and unwritten shared memory is NaN, so that a missing wait or fence or an early
release gives a wrong result. `x += y` changes x in place here: what two names hold is spelled `x = x + y` in a kernel.

The words of the language are here, what they act on in `gluon_machine.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import random
import sys
import threading
import time
import types
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.gluon_machine import PATIENCE, Bars, Copies, Descriptor, Machine, Pending, Pointer, Shared, layouts, value


def _mma(a, b, acc, use_acc=True, is_async=True):
    def run():
        left = a.load() if isinstance(a, Shared) else a
        product = left.float() @ b.load().float()
        return product + acc if use_acc else product

    p = Pending(run)
    Machine.local.queue.append(p)
    return p


def _mma_wait(outstanding, deps):
    queue = Machine.local.queue
    time.sleep(random.random() * 3e-3)  # time for others to overwrite what was released too early
    while len(queue) > outstanding:
        p = queue.pop(0)
        p.result = value(p.run())
    return deps[0].result


def _tma_load(desc, coord, bar, dst):
    assert [dst.rows, dst.cols] == desc.block[2:]
    size = desc.block[2] * desc.block[3] * desc.dtype.itemsize

    def land():
        time.sleep(max(0.0, random.random() - 0.5) * 4e-3)
        block = torch.zeros(dst.rows, dst.cols, dtype=dst.dtype)
        got = desc.window(coord)
        skip = max(0, -int(coord[2]))  # rows before the first are zero, like those after the last
        block[skip : skip + got.shape[0]] = got
        dst.store(block)
        bar.change(size=-size)

    threading.Thread(target=land, daemon=True).start()


def _copy_async(dst, ptr):
    at = ptr.where()
    assert list(at.shape) == [dst.rows, dst.cols], f"{list(at.shape)} into {[dst.rows, dst.cols]}"
    assert bool((at[:, ::8] % 8 == 0).all()), "rows of no multiple of 16 bytes"
    Machine.local.copies.started.append((dst, ptr.data[at.long()]))


def _load(ptr, mask=None, other=0):
    at = torch.as_tensor(ptr.offset)
    keep = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    inside = (at >= 0) & (at < ptr.data.numel())
    assert bool((inside | ~keep).all()), f"address {at} outside {ptr.data.numel()}"
    x = torch.where(keep, ptr.data[at.clamp(0, ptr.data.numel() - 1)], torch.as_tensor(other, dtype=ptr.data.dtype))
    return value(x if x.dtype.is_floating_point else x.to(torch.int64))


def _expect(bar, size, pred=True):
    if bool(pred):
        bar.change(1, size)


def _arrive(bar, count, pred=True):
    if bool(pred):
        bar.change(arrivals=count)


def _tma_store(desc, coord, src):
    assert int(coord[2]) >= 0, "a store from rows before the first was an illegal instruction on a card"
    to = desc.window(coord)
    to.copy_(src.load()[: to.shape[0]])


def _allocate(dtype, shape, layout=None):
    if dtype == torch.int64:
        return Bars(shape[0])
    fill = float("nan") if dtype.is_floating_point else min(1 << 29, torch.iinfo(dtype).max)
    rows, cols = shape[1:] if len(shape) == 3 else (1, shape[1])
    return Shared(torch.full((shape[0] * rows * cols,), fill, dtype=dtype), rows, cols)


def _atomic_add(ptr, x):
    with Machine.lock:
        old = int(ptr.data[int(ptr.where())])
        ptr.data[int(ptr.where())] += x
    return value(old)


def _store(ptr, x, mask=None):
    keep = torch.Tensor(mask) if mask is not None else torch.ones_like(torch.Tensor(x), dtype=torch.bool)
    at = torch.as_tensor(ptr.offset)[keep]
    assert bool(((at >= 0) & (at < ptr.data.numel())).all())
    ptr.data[at] = torch.Tensor(x)[keep].to(ptr.data.dtype)


def _atomic_or(ptr, x, mask, sem=None):
    keep = torch.as_tensor(mask)
    places = Pointer(ptr.data, torch.as_tensor(ptr.offset)[keep]).where()
    with Machine.lock:
        for at, new in zip(places.tolist(), torch.as_tensor(x)[keep].tolist(), strict=True):
            word = (int(ptr.data[at]) | new) & (1 << 32) - 1
            ptr.data[at] = word - (word >> 31 << 32)  # as int32


def _reduce_or(x, axis):
    return value(x.any(axis)) if x.dtype == torch.bool else value(functools.reduce(torch.bitwise_or, x.unbind(axis)))


def _binary(fn):
    return lambda a, b: value(fn(torch.as_tensor(a), torch.as_tensor(b)))


def _none(*args, **kwargs):
    return None


def _same(x, *args, **kwargs):
    return x


def language():
    """The names that the kernel imports from its shim."""
    gl = SimpleNamespace(
        constexpr=lambda x: x, static_range=range, float32=torch.float32, int32=torch.int32, int64=torch.int64,
        BlockedLayout=_none, SliceLayout=_none, NVMMADistributedLayout=_none, DotOperandLayout=_none,
        SwizzledSharedLayout=_none, convert_layout=_same, allocate_shared_memory=_allocate,
        arange=lambda a, b, layout=None: value(torch.arange(a, b)),
        zeros=lambda s, d, l=None: value(torch.zeros(s, dtype=d)),
        full=lambda s, x, d, l=None: value(torch.full(s, x, dtype=d)), expand_dims=lambda x, a: x.unsqueeze(a),
        where=lambda c, a, b: value(torch.where(torch.as_tensor(c), a, b)), max=lambda x, a: x.amax(a),
        sum=lambda x, a: x.sum(a), exp2=torch.exp2, log2=torch.log2, minimum=_binary(torch.minimum),
        maximum=_binary(torch.maximum), load=_load, store=_store,
        atomic_add=_atomic_add, atomic_or=_atomic_or, reduce_or=_reduce_or, abs=torch.abs, div_rn=torch.div,
        program_id=lambda axis: value(Machine.local.cta[axis]), num_programs=lambda axis: Machine.ctas[axis],
        warp_specialize=lambda functions, warps, registers: Machine.start(functions),
    )  # fmt: skip
    barrier = SimpleNamespace(
        MBarrierLayout=_none, init=lambda bar, count: bar.init(count), wait=lambda bar, phase: bar.wait(phase),
        arrive=_arrive, expect=_expect,
    )  # fmt: skip
    jit = SimpleNamespace(jit=lambda fn=None, **kw: fn if fn is not None else (lambda f: f))
    return dict(
        gl=gl, gluon=jit, mbarrier=barrier, partition_barrier=_none, store_wait=_none,
        fence_async_shared=lambda: Machine.local.copies.fence(),
        tma_load=_tma_load, tma_store=_tma_store, warpgroup_mma=_mma, warpgroup_mma_wait=_mma_wait,
        as_blocks=lambda buf, desc, count, rows, cols: Shared(buf.flat, rows, cols),
        as_rows=lambda buf, count, rows, cols, layout: Shared(buf.flat, rows, cols), copy_async=_copy_async,
        copy_commit=lambda: Machine.local.copies.commit(), copy_wait=lambda left: Machine.local.copies.wait(left),
    )  # fmt: skip


def load_kernel(path: Path):
    """The module `kernel.py` with its shim replaced by the emulated language."""
    shim = types.ModuleType("gluon_emulated.shim")
    shim.__dict__.update(language())
    package = types.ModuleType("gluon_emulated")
    package.__path__ = [str(path.parent)]  # what the kernel imports besides the shim is real
    for name in [n for n in sys.modules if n.startswith("gluon_emulated")]:
        del sys.modules[name]
    sys.modules.update({"gluon_emulated": package, "gluon_emulated.shim": shim})
    spec = importlib.util.spec_from_file_location("gluon_emulated.kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(kernel, ctas, *args, **options):
    """Run `kernel` with that many CTAs (a number, or two of a grid) at once; raises what any partition raised."""
    Machine.failed, Machine.errors, Machine.lock = False, [], threading.Lock()
    Machine.ctas = ctas if isinstance(ctas, tuple) else (ctas,)

    def cta(i):
        Machine.local.cta, Machine.local.queue, Machine.local.copies = i, [], Copies()
        try:
            kernel(*args, **options)
        except BaseException as err:
            Machine.errors.append(err)

    places = itertools.product(*(range(n) for n in Machine.ctas))
    threads = [threading.Thread(target=cta, args=(place,), daemon=True) for place in places]
    with layouts():
        for t in threads:
            t.start()
        for t in threads:
            t.join(PATIENCE * 4)
    if Machine.errors:
        raise Machine.errors[0]
    assert not any(t.is_alive() for t in threads), "a CTA did not end"


# ---------------------------------------------------------------------- what the backward kernel needs beyond that
class Line(Shared):
    """Rows of numbers `[count, cols]`, one of them at a time."""

    def index(self, i):
        return Line(self.flat, 1, self.cols, int(i))

    def load(self, layout=None):
        return value(self.flat[self.at * self.cols : (self.at + 1) * self.cols].clone())

    def store(self, x):
        self.flat[self.at * self.cols : (self.at + 1) * self.cols] = torch.Tensor(x)


def _allocate_lines(dtype, shape, layout=None):
    if len(shape) == 2 and shape[1] > 1:
        return Line(torch.full((shape[0] * shape[1],), float("nan"), dtype=dtype), 1, shape[1])
    return _allocate(dtype, shape, layout)


def _wait_all(outstanding, deps):
    _mma_wait(outstanding, deps)
    return deps[0].result if len(deps) == 1 else tuple(d.result for d in deps)


def _store_any(ptr, x, mask=None):
    x = torch.as_tensor(x)
    at = torch.as_tensor(ptr.offset)
    mask = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand_as(at)
    _store(Pointer(ptr.data, at), x, mask)


def backward_language():
    """The names that the backward kernel imports from its shim."""
    names = language()
    gl = names["gl"]
    gl.load, gl.store, gl.allocate_shared_memory, gl.min = _load, _store_any, _allocate_lines, lambda x, a: x.amin(a)
    names["warpgroup_mma_wait"] = _wait_all
    names["as_floats"] = lambda buf, count, rows, cols: Shared(buf.flat.view(torch.float32), rows, cols)
    return names


def load_backward(*paths: Path):
    """The modules of the backward kernels, each after those it imports, their shim replaced by the emulated language."""
    package = types.ModuleType("gluon_emulated_backward")
    package.__path__ = []
    shim = types.ModuleType(package.__name__ + ".shim")
    shim.__dict__.update(backward_language())
    sys.modules.update({package.__name__: package, shim.__name__: shim})
    modules = []
    for path in paths:
        spec = importlib.util.spec_from_file_location(f"{package.__name__}.{path.stem}", path)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
        modules.append(sys.modules[spec.name])
    return modules


__all__ = ["Descriptor", "Pointer", "launch", "load_backward", "load_kernel"]
