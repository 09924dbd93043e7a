"""How numbers are widened, rounded and ordered: `fastmerge/reference/numbers.py` in Triton.

COMPUTE names the dtype C whose precision intermediate results have: 0 for float32, 1 for bfloat16, 2 for float16.
"""

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)

INF_KEY = tl.constexpr(0x7F800000)
NAN_KEY = tl.constexpr(0x7FC00000)


@triton.jit
def widen(x):
    """Loaded values of any of the three types as float32, exactly."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def is_nan(x):
    """Which float32 values are NaN, by their bits."""
    return (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) > INF_KEY


@triton.jit
def rounded_bfloat16(x):
    """float32 to the nearest bfloat16, ties to even; NaN to the one without a payload."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(is_nan(x), 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rounded_float16(x):
    """float32 to the nearest float16, ties to even; NaN to the one without a payload."""
    bits = x.to(tl.float16).to(tl.uint16, bitcast=True)
    return tl.where(is_nan(x), 0x7E00, bits.to(tl.uint32)).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def canonical(x):
    """float32 with every NaN replaced by the one without a payload."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(is_nan(x), NAN_KEY, bits).to(tl.float32, bitcast=True)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 rounded once to the dtype that is stored."""
    if dtype == tl.bfloat16:
        return rounded_bfloat16(x)
    elif dtype == tl.float16:
        return rounded_float16(x)
    else:
        return canonical(x)


@triton.jit
def round_to(x, COMPUTE: tl.constexpr):
    """float32 values rounded to C and widened again."""
    if COMPUTE == BFLOAT16:
        return widen(rounded_bfloat16(x))
    elif COMPUTE == FLOAT16:
        return widen(rounded_float16(x))
    else:
        return x


@triton.jit
def magnitude_key(x):
    """The 31-bit keys of float32 values, int32: they order as magnitudes do, and every NaN has one, above infinity."""
    bits = (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32, bitcast=True)
    return tl.where(bits > INF_KEY, NAN_KEY, bits)


@triton.jit
def loaded(pointer, start, length, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """BLOCK values from `start` on as float32; +0 from `length` on. WHOLE: there are that many, and no mask is needed.

    start, length: int64.
    """
    place = tl.arange(0, BLOCK)
    if WHOLE:
        return widen(tl.load(pointer + start + place))
    else:
        return widen(tl.load(pointer + start + place, mask=place < length - start, other=0.0))


@triton.jit
def stored(pointer, start, length, x, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Store float32 values, rounded once to the pointer's dtype; the inverse of `loaded`."""
    place = tl.arange(0, BLOCK)
    value = narrowed(x, pointer.dtype.element_ty)
    if WHOLE:
        tl.store(pointer + start + place, value)
    else:
        tl.store(pointer + start + place, value, mask=place < length - start)


@triton.jit
def difference(base, x, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr):
    """The delta x - base of widened values, each step rounded to C; x itself without a base."""
    if HAS_BASE:
        return round_to(round_to(x, COMPUTE) - round_to(base, COMPUTE), COMPUTE)
    else:
        return round_to(x, COMPUTE)


@triton.jit
def sign(x):
    """+1, -1 or 0 as float32; zeros of both signs and NaN have sign 0."""
    return tl.where(x > 0.0, 1.0, 0.0) - tl.where(x < 0.0, 1.0, 0.0)
