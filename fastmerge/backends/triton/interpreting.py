"""Mends of Triton's interpreter, which is otherwise not what compiled kernels are; used where kernels are interpreted.

Each says what is wrong, and in which version it was seen.
"""

from __future__ import annotations

from typing import Any

import numpy


def mend() -> None:
    """Make all mends, once, before the first kernel runs."""
    _prefer_numbers_to_nan()
    _let_scalars_bound_loops()
    _give_numbers_their_size()
    _patch_once()
    _sort_at_once()


def _let_scalars_bound_loops() -> None:
    """Let `range(n)` run in the interpreter for n of a kernel: Triton 3.6 converts it in a way numpy 2.4 refuses."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _give_numbers_their_size() -> None:
    """Let kernels have 2**31 to 2**32 - 1 as the int64 that they are called with, not as half of one (Triton 3.9).

    And -0.0 as the float32 that it is, not as 0.0 (Triton 3.6): as a number of Python's it would lose its sign.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._implicit_cvt

    def patched(argument: Any) -> Any:
        if type(argument) is float:
            handle = interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        made = original(argument)
        if type(argument) is int and 1 << 31 <= argument < 1 << 32:
            made.handle.data = made.handle.data.astype(numpy.int64)
        return made

    interpreter._implicit_cvt = patched


def _patch_once() -> None:
    """Let what a kernel calls use the language as it has been patched: doing it at each call takes most of the time.

    The launch has patched what kernels import and takes it back; what Triton's own functions import stays patched.
    """
    from triton.runtime import interpreter

    patched: set[str] = set()

    def call(self: Any, *arguments: Any, **constants: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*arguments, **constants)

    interpreter.InterpretedFunction.__call__ = call


def _prefer_numbers_to_nan() -> None:
    """Let `tl.maximum(x, 0.0)` be 0 where x is NaN, as compiled code has it, and not NaN."""
    from triton.runtime import interpreter

    interpreter.InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, numpy.fmax)
    interpreter.InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, numpy.fmin)


def _sort_at_once() -> None:
    """Let NumPy do what `tl.sort` does: comparing in the interpreter, exchange by exchange, takes seconds."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def sort(x: Any, dim: int = -1, descending: bool = False) -> Any:
        ordered = numpy.sort(x.handle.data, axis=int(dim))
        if descending:
            ordered = numpy.flip(ordered, axis=int(dim))
        return tl.tensor(TensorHandle(ordered, x.handle.dtype), x.type)

    tl.sort = sort
