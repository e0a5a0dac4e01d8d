"""Kernels compiled for Hopper on a machine without a GPU, with what they take of a multiprocessor."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
def hopper(monkeypatch, folder, module, *names):
    """Launches of these kernels of a module in this block are recorded and, when it ends, compiled for sm_90.

    Gives a list, filled at the end, of (name, compiled kernel, {"REG": registers, "STACK": bytes}) a launch.
    """
    triton = pytest.importorskip("triton")
    from foveate.kernels.gluon.shim import compile_sm90

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton ships no cuobjdump")
    launches, built = [], []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((self.kernel, args, options))

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(module, name, Recorder(getattr(module, name)))
        yield built
    for kernel, args, options in launches:
        done = compile_sm90(kernel, list(args), options)
        (folder / "kernel.cubin").write_bytes(done.asm["cubin"])
        command = [tool, "-res-usage", folder / "kernel.cubin"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = {what: int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK")}
        built.append((kernel.fn.__name__, done, usage))
