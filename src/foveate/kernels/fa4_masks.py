"""Masks that FlashAttention-4 compiles into its kernels. Imported only where it is installed: CuTe reads their source."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


@cute.jit
def causal_square(batch, head, row, key, seqlen, aux):  # type: ignore[no-untyped-def]
    """As many rows as keys."""
    return key <= row


@cute.jit
def causal_last(batch, head, row, key, seqlen, aux):  # type: ignore[no-untyped-def]
    """The rows are the last ones of the keys."""
    return key <= row + utils.scalar_to_ssa(seqlen.seqlen_k - seqlen.seqlen_q, cutlass.Int32)
