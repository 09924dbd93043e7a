"""Tables of addresses and numbers in the GPU's memory, written by a kernel: no copy from the host, nothing to wait for.

Such a launch can be captured in a CUDA graph, and the numbers may be gone from the host when it runs.
"""

import triton
import triton.language as tl

ROW = 16
"""Numbers that one launch writes."""


@triton.jit(do_not_specialize=[f"v{i}" for i in range(ROW)])
def write_row(
    out,
    v0: "i64", v1: "i64", v2: "i64", v3: "i64", v4: "i64", v5: "i64", v6: "i64", v7: "i64",
    v8: "i64", v9: "i64", v10: "i64", v11: "i64", v12: "i64", v13: "i64", v14: "i64", v15: "i64",
):  # fmt: skip
    """out: int64[16]."""
    tl.store(out + 0, v0)
    tl.store(out + 1, v1)
    tl.store(out + 2, v2)
    tl.store(out + 3, v3)
    tl.store(out + 4, v4)
    tl.store(out + 5, v5)
    tl.store(out + 6, v6)
    tl.store(out + 7, v7)
    tl.store(out + 8, v8)
    tl.store(out + 9, v9)
    tl.store(out + 10, v10)
    tl.store(out + 11, v11)
    tl.store(out + 12, v12)
    tl.store(out + 13, v13)
    tl.store(out + 14, v14)
    tl.store(out + 15, v15)


@triton.jit
def float_of(number):
    """The float32 whose bits are the low half of an int64 of a table."""
    return number.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def address_of(number, like: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of a table as a pointer to `like`. ALIGNED: it is a multiple of 16, and loads may be as wide."""
    pointer = number.to(tl.pointer_type(like))
    if ALIGNED:
        return tl.multiple_of(pointer, 16)
    else:
        return pointer
