"""Triton's interpreter without work that it does again in every operation, and whose result is the same each time."""

from __future__ import annotations

from functools import partial
from typing import Any


def quicken() -> None:
    """Patch Triton's interpreter (3.6 to 3.9) in this process. Results, checks and messages stay as they are.

    Most of the time of a launch goes into four things: the functions of `triton.language` are replaced by those that
    compute once more in every call of one `@triton.jit` function by another; numpy's types, the types of blocks and the
    shapes of tensors are made anew for every operation; and every tuple, so every shape, gets a type nobody asks for.
    """
    from triton.language import core
    from triton.runtime import interpreter

    needed = {interpreter: ("_patch_lang", "_LangPatchScope", "_get_np_dtype"), core: ("_type_for_tuple_values",)}
    if not all(hasattr(module, name) for module, names in needed.items() for name in names):
        return  # another version: slower, not otherwise
    patch, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    block_init, tensor_init = core.block_type.__init__, core.tensor.__init__
    types: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def patched(fn: Any) -> Any:
        # a kernel calls `triton.language`; the functions that Triton itself writes in Triton use its `core`
        missing = any(core.is_builtin(module.load) for module in (interpreter.tl, core))
        return patch(fn) if missing else interpreter._LangPatchScope()

    def remembered(of: Any) -> Any:
        if of.name not in types:
            types[of.name] = numpy_type(of)
        return types[of.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(n, "value", n) for n in shape)
        if not all(type(n) is int for n in key[1:]):
            return block_init(self, element_ty, shape)  # which says what is wrong with it
        if key not in blocks:
            block_init(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key], element_ty=element_ty)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            tensor_init(self, handle, type)
            tensors[type.name] = vars(self).copy()
        vars(self).update(tensors[type.name], handle=handle, type=type, dtype=type.scalar)

    def read(self: Any) -> Any:
        held = vars(self)
        if isinstance(held["type"], partial):
            held["type"] = held["type"]()
        return held["type"]

    interpreter._patch_lang, interpreter._get_np_dtype = patched, remembered
    core.block_type.__init__, core.tensor.__init__ = block, tensor
    core._type_for_tuple_values = partial(partial, core._type_for_tuple_values)
    core.tuple.type = property(read, lambda self, new: vars(self).update(type=new))
