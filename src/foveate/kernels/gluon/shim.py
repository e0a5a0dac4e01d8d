"""All that depends on Gluon's moving interface, for Triton 3.6 to 3.9. The kernels import their names from here.

Gluon is `triton.experimental`: names change with every release. What changed so far (new name first, old in brackets):
`tma.async_load` (`async_copy_global_to_shared`), `tma.async_store` (`async_copy_shared_to_global`), `gl.barrier`
(`gl.thread_barrier`), `memdesc.reinterpret` (`_reinterpret`).
"""

from collections.abc import Sequence
from functools import lru_cache

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "as_blocks",
    "as_floats",
    "compile_sm90",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "partition_barrier",
    "shared_layout",
    "store_wait",
    "tma_load",
    "tma_store",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
store_wait = tma.store_wait
partition_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def as_blocks(buf, desc, COUNT: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
        """A shared buffer seen as COUNT blocks of a rank-4 descriptor, `[COUNT, 1, 1, ROWS, COLS]`: what TMA fills."""
        return buf.reinterpret(desc.dtype, [COUNT, 1, 1, ROWS, COLS], desc.layout)

else:

    @gluon.jit
    def as_blocks(buf, desc, COUNT: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
        """A shared buffer seen as COUNT blocks of a rank-4 descriptor, `[COUNT, 1, 1, ROWS, COLS]`: what TMA fills."""
        return buf._reinterpret(desc.dtype, [COUNT, 1, 1, ROWS, COLS], desc.layout)


def shared_layout(block: Sequence[int], dtype: gl.dtype) -> gl.NVMMASharedLayout:
    """The swizzled shared-memory layout that TMA writes and wgmma reads for a block of this shape."""
    return _shared_layout(tuple(block), dtype)


@lru_cache(maxsize=256)
def _shared_layout(block: tuple[int, ...], dtype: gl.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)


def compile_sm90(fn, args, options):  # type: ignore[no-untyped-def]
    """Compile a kernel for Hopper on a machine without one; `.asm` of the result holds "ttgir", "ptx" and "cubin".

    Args:
        fn: a `gluon.jit` or `triton.jit` function. args: its arguments; tensors may be any object with `dtype`
            (prints as torch.<name>, has `itemsize`), `data_ptr()` and `ptr_range()`.
        options: constexpr arguments and launch options by name.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = {"debug": False, "sanitize_overflow": False, **options}
    bound, spec, opts = create_function_from_signature(fn.signature, fn.params, backend)(*args, **options)
    opts, signature, constexprs, attrs = fn._pack_args(backend, options, bound, spec, opts)
    source = (GluonASTSource if fn.is_gluon() else ASTSource)(fn, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=opts.__dict__)


# ---------------------------------------------------------------------- gathers by cp.async (columns.py)
from triton.experimental.gluon.language.nvidia.ampere import async_copy  # noqa: E402

__all__ += ["as_rows", "copy_async", "copy_commit", "copy_wait"]

copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
copy_commit = async_copy.commit_group
copy_wait = async_copy.wait_group

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def as_rows(buf, COUNT: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, LAYOUT: gl.constexpr):
        """A shared buffer seen as COUNT blocks `[COUNT, ROWS, COLS]` of a layout."""
        return buf.reinterpret(buf.dtype, [COUNT, ROWS, COLS], LAYOUT)

else:

    @gluon.jit
    def as_rows(buf, COUNT: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, LAYOUT: gl.constexpr):
        """A shared buffer seen as COUNT blocks `[COUNT, ROWS, COLS]` of a layout."""
        return buf._reinterpret(buf.dtype, [COUNT, ROWS, COLS], LAYOUT)


# ---------------------------------------------------------------------- the backward pass
# Rows of fp32, pairs of columns shifted from row to row so that the accumulators of a warp meet in few banks.
_FLOATS = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def as_floats(buf, COUNT: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
        """A shared buffer seen as COUNT blocks of fp32 `[ROWS, COLS]`."""
        return buf.reinterpret(gl.float32, [COUNT, ROWS, COLS], _FLOATS)

else:

    @gluon.jit
    def as_floats(buf, COUNT: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
        """A shared buffer seen as COUNT blocks of fp32 `[ROWS, COLS]`."""
        return buf._reinterpret(gl.float32, [COUNT, ROWS, COLS], _FLOATS)
