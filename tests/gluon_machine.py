"""What emulated Gluon kernels (`gluon_emulator.py`) run on: memory, barriers, copies in flight, partitions as threads."""

from __future__ import annotations

import functools
import threading
from contextlib import contextmanager

import torch

PATIENCE = 60.0  # seconds without progress at a barrier count as a deadlock
TYPE = torch._C.TensorBase.type  # what `torch.Tensor` inherits


def _typed(x):
    """`x.type` with the `.layout` that the kernel asks for. Called, it is what it was: other tests share the process."""
    made = functools.partial(TYPE, x)
    made.layout = None
    return made


@contextmanager
def layouts():
    """While a kernel runs, every tensor has a `.type` with a layout. A subclass of tensors would too, at seven times the
    time of an operation; left behind, the property breaks torch.compile in the tests that follow."""
    torch.Tensor.type = property(_typed)
    try:
        yield
    finally:
        del torch.Tensor.type  # what it inherits comes to light again


def value(x, dtype=None):
    return torch.as_tensor(x, dtype=dtype)


class Pointer:
    def __init__(self, data, offset=0):
        self.data, self.offset = data, offset

    def __add__(self, other):
        return Pointer(self.data, self.offset + other)

    def __sub__(self, other):
        return Pointer(self.data, self.offset - other)

    def where(self):
        at = torch.as_tensor(self.offset)
        assert bool(((at >= 0) & (at < self.data.numel())).all()), f"address {at} outside {self.data.numel()}"
        return at


class Bar:
    def __init__(self):
        self.cond = threading.Condition()
        self.parity = self.bytes = 0

    def init(self, count):
        self.count = self.pending = count

    def change(self, arrivals=0, size=0):
        with self.cond:
            self.pending -= arrivals
            self.bytes += size
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.parity ^= 1
                self.pending = self.count
                self.cond.notify_all()

    def wait(self, parity):
        with self.cond:
            if not self.cond.wait_for(lambda: self.parity != int(parity) or Machine.failed, PATIENCE):
                raise RuntimeError("deadlock at a barrier")
            if Machine.failed:
                raise RuntimeError("another partition failed")


class Shared:
    """Blocks of `[rows, cols]` in the order of a 128-byte swizzle: 64 columns of all rows, then the next 64."""

    def __init__(self, flat, rows, cols, at=None, flip=False):
        self.flat, self.rows, self.cols, self.at, self.flip = flat, rows, cols, at, flip
        self.dtype = flat.dtype

    def index(self, i):
        return Shared(self.flat, self.rows, self.cols, int(i))

    def permute(self, order):
        return Shared(self.flat, self.rows, self.cols, self.at, True)

    def _block(self):
        size = self.rows * self.cols
        assert 0 <= (self.at + 1) * size <= self.flat.numel()
        part = min(64, self.cols)
        return self.flat[self.at * size : (self.at + 1) * size].view(self.cols // part, self.rows, part)

    def store(self, x):
        part = min(64, self.cols)
        self._block().copy_(torch.Tensor(x).reshape(self.rows, self.cols // part, part).transpose(0, 1))

    def load(self, layout=None):
        x = self._block().transpose(0, 1).reshape(self.rows, self.cols).clone()
        if self.rows == 1:
            return value(x.view(self.cols))
        return value(x.T if self.flip else x)


class Bars:
    def __init__(self, n):
        self.bars = [Bar() for _ in range(n)]

    def index(self, i):
        return self.bars[int(i)]


class Descriptor:
    def __init__(self, tensor, block):
        self.tensor, self.block, self.dtype, self.layout = tensor, block, tensor.dtype, None

    def window(self, coord):
        b, h, row, col = (int(c) for c in coord)
        assert self.block[:2] == [1, 1] and 0 <= b < self.tensor.shape[0] and 0 <= h < self.tensor.shape[1]
        return self.tensor[b, h, max(row, 0) : max(row + self.block[2], 0), col : col + self.block[3]]


class Pending:
    """A product in flight; it reads its operands when it is waited for."""

    def __init__(self, run):
        self.run, self.result = run, None


class Copies:
    """cp.async of one partition: what was started, committed, waited for (by groups); a fence shows the last to wgmma."""

    def __init__(self):
        self.started, self.groups, self.landed = [], [], []

    def commit(self):
        self.groups.append(self.started)
        self.started = []

    def wait(self, outstanding):
        while len(self.groups) > outstanding:
            self.landed += self.groups.pop(0)

    def fence(self):
        for dst, block in self.landed:
            dst.store(block)
        self.landed = []


class Machine:
    """One launch. Class attributes are the state of the launch under way (one at a time)."""

    failed = False
    local = threading.local()

    @classmethod
    def start(cls, functions):
        threads = []
        cta = cls.local.cta

        def work(fn, args):
            cls.local.cta, cls.local.queue, cls.local.copies = cta, [], Copies()
            try:
                fn(*args)
            except BaseException as err:
                cls.errors.append(err)
                Machine.failed = True

        for fn, args in functions:
            threads.append(threading.Thread(target=work, args=(fn, args), daemon=True))
            threads[-1].start()
        for t in threads:
            t.join(PATIENCE * 3)
            assert not t.is_alive(), "a partition did not end"
