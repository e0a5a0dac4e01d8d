"""A launch made again: what Triton found out about its arguments the first time is not found out once more.

`kernel[grid](...)` binds some forty arguments, turns each into a type and facts such as "divisible by 16", and looks up the
compiled kernel under all of that: more host time than a short kernel runs. Those facts follow from shapes, strides, dtypes
and alignments of the tensors and from the other numbers of a call. A call in which all of these came before reuses the
compiled kernel and the list of arguments; only its tensors are new. Module constants that the kernel reads must be those
of its first launch: a call after one has changed goes to Triton again, which refuses it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

MOST = 1024  # launches remembered; beyond that all are forgotten
Arguments = tuple[tuple[int, ...], list[Any], dict[str, Any]]  # of a launch: grid, in order, by name


class Like(NamedTuple):
    """A descriptor without its tensor: what passed the checks of its class once."""

    kind: type
    fields: dict[str, Any]

    @staticmethod
    def of(descriptor: Any) -> Like:
        return Like(type(descriptor), {**vars(descriptor), "base": None})

    def over(self, base: Tensor | None) -> Any:
        """The same descriptor of another tensor of that shape, strides, dtype and alignment."""
        out: Any = object.__new__(self.kind)
        out.__dict__.update(self.fields)
        out.base = base
        return out


class Held(NamedTuple):
    """One launch: `places` are (argument, number of its tensor, its descriptor or None if it is the tensor itself);
    `constants` are (module, name, value) of what the kernel, and what it calls, read there. `kernel` is kept so that nothing
    else can have its id."""

    kernel: Any
    compiled: Any
    grid: tuple[int, int, int]
    args: list[Any]
    places: list[tuple[int, int, Like | None]]
    constants: list[tuple[dict[str, Any], str, Any]]


_HELD: dict[Hashable, Held] = {}
_LOCK = threading.Lock()


def launch(kernel: Any, tensors: Sequence[Tensor | None], facts: Hashable, build: Callable[[], Arguments]) -> None:
    """Launch a kernel of Triton or Gluon on the current device.

    Args:
        kernel: the jit function. tensors: every tensor it is given, itself or as the base of a descriptor, among others.
        facts: all that `build` depends on beside these tensors' shapes, strides, dtypes, devices and alignments.
        build: says the grid, the arguments in order, and the others with launch options by name. Not called when a launch of
            this kernel with tensors and facts like these was made before.
    """
    key = _key(kernel, tensors, facts)
    held = _HELD.get(key)
    for module, name, value in () if held is None else held.constants:
        if module.get(name) is not value:
            held = None
            break
    if held is None:
        grid, args, options = build()
        compiled = kernel[grid](*args, **options)
        if isinstance(compiled, CompiledKernel) and not getattr(kernel, "pre_run_hooks", None) and torch.version.hip is None:
            _remember(key, _held(kernel, compiled, grid, args, options, tensors))
        return
    args = held.args.copy()
    for at, number, like in held.places:
        args[at] = tensors[number] if like is None else like.over(tensors[number])
    held.compiled[held.grid](*args)


def _key(kernel: Any, tensors: Sequence[Tensor | None], facts: Hashable) -> Hashable:
    """What a launch depends on. It includes which tensors are one and the same, since arguments are told apart by that."""
    marks: list[Any] = [id(kernel), facts, *_modes()]
    ids: list[int] = []
    for t in tensors:
        if t is None:
            marks.append(None)
        elif (one := id(t)) in ids:
            marks.append(ids.index(one))
        else:
            ids.append(one)
            marks += (t.shape, t.stride(), t.dtype, t.data_ptr() & 15, t.get_device())
    return tuple(marks)


def _modes() -> tuple[Any, ...]:
    """Switches of Triton under which one kernel is compiled in several ways; not every version has all."""
    run, build = knobs.runtime, knobs.compilation
    late = getattr(run, "add_stages_inspection_hook", None), getattr(build, "fpsan_homomorphic_casts", None)
    return run.debug, build.instrumentation_mode, *late


def _held(
    kernel: Any,
    compiled: Any,
    grid: tuple[int, ...],
    args: list[Any],
    options: dict[str, Any],
    tensors: Sequence[Tensor | None],
) -> Held | None:
    """The launch without its tensors; None if an argument holds a tensor that is not among them."""
    full = [*args, *(options.get(p.name, p.default) for p in kernel.params[len(args) :])]
    places: list[tuple[int, int, Like | None]] = []
    for at, arg in enumerate(full):
        base = getattr(arg, "base", arg) if hasattr(arg, "block_shape") else arg
        if isinstance(base, Tensor):
            number = next((i for i, t in enumerate(tensors) if t is base), None)
            if number is None:
                return None
            places.append((at, number, None if base is arg else Like.of(arg)))
            full[at] = None
    x, y, z = (*grid, 1, 1)[:3]
    read = getattr(kernel, "used_global_vals", {})  # by Triton: (name, id of module) -> (value it compiled, module)
    constants = [(module, name, module[name]) for (name, _), (_, module) in read.items()]
    return Held(kernel, compiled, (x, y, z), full, places, constants)


def _remember(key: Hashable, held: Held | None) -> None:
    if held is not None:
        with _LOCK:
            if len(_HELD) >= MOST:
                _HELD.clear()
            _HELD[key] = held
