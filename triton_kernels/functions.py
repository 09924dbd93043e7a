"""exp, tanh and log for float32: `fastmerge/reference/functions.py` in Triton, the same bits.

Only additions, multiplications, one division and integer operations on bits, each rounded on its own, and no branch.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))
LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e4p-1"))
LN2_LOW = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, which is in the low bits then
ROUNDER_BITS = tl.constexpr(0x4B400000)
C5 = tl.constexpr(float.fromhex("0x1.6a23a8p-10"))
C4 = tl.constexpr(float.fromhex("0x1.123a36p-7"))
C3 = tl.constexpr(float.fromhex("0x1.5558f4p-5"))
C2 = tl.constexpr(float.fromhex("0x1.555490p-3"))
C1 = tl.constexpr(float.fromhex("0x1.fffffcp-2"))


@triton.jit
def power_of_two(k):
    """2**k as float32, for int32 -127 < k < 128."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def reduced(x):
    """The r, and the k (int32), of x = k ln 2 + r."""
    shifted = x * LOG2_E + ROUNDER
    k = shifted - ROUNDER
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    return r, shifted.to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def reduced_expm1(r):
    """e**r - 1 for |r| <= ln 2 / 2."""
    q = C5 * r + C4
    q = q * r + C3
    q = q * r + C2
    q = q * r + C1
    return r + (r * r) * q


@triton.jit
def exp(x):
    """e**x, at most 1 ulp off: inf above 88.72, denormal below -87.34, 0 below -103.97."""
    low = tl.where(x < -104.0, -104.0, x)
    r, k = reduced(tl.where(low > 89.0, 89.0, low))
    value = reduced_expm1(r) + 1.0
    # In two factors: 2**128 and 2**-150 are no float32, and a denormal result must be rounded once.
    half = k >> 1
    return (value * power_of_two(half)) * power_of_two(k - half)


@triton.jit
def tanh(x):
    """The hyperbolic tangent, at most 2.7 ulp off: odd, never beyond 1, x where x is tiny."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    bounded = tl.where(magnitude > 10.0, 10.0, magnitude)
    r, k = reduced(bounded + bounded)
    scale = power_of_two(k)
    expm1 = reduced_expm1(r) * scale + (scale - 1.0)
    value = tl.div_rn(expm1, expm1 + 2.0)
    return (value.to(tl.uint32, bitcast=True) & 0x7FFFFFFF | bits & 0x80000000).to(tl.float32, bitcast=True)


SMALLEST_NORMAL = tl.constexpr(2.0**-126)
TWO_23 = tl.constexpr(2.0**23)
ROOT_HALF_BITS = tl.constexpr(0x3F3504F3)  # of the float32 just below the root of 1/2
INF_BITS = tl.constexpr(0x7F800000)
MINUS_INF_BITS = tl.constexpr(0xFF800000)
NAN_BITS = tl.constexpr(0x7FC00000)
L7 = tl.constexpr(float.fromhex("-0x1.38b56ap-4"))
L6 = tl.constexpr(float.fromhex("0x1.055b66p-3"))
L5 = tl.constexpr(float.fromhex("-0x1.0d8544p-3"))
L4 = tl.constexpr(float.fromhex("0x1.22da1ep-3"))
L3 = tl.constexpr(float.fromhex("-0x1.547244p-3"))
L2 = tl.constexpr(float.fromhex("0x1.99a008p-3"))
L1 = tl.constexpr(float.fromhex("-0x1.000226p-2"))
L0 = tl.constexpr(float.fromhex("0x1.555554p-2"))


@triton.jit
def log_polynomial(f):
    """The P of log(1 + f) = f - f**2 / 2 + f**3 P(f), for sqrt(1/2) <= 1 + f < sqrt(2)."""
    p = f * L7 + L6
    p = p * f + L5
    p = p * f + L4
    p = p * f + L3
    p = p * f + L2
    p = p * f + L1
    return p * f + L0


@triton.jit
def log(x):
    """The natural logarithm, at most 0.9 ulp off: -inf at 0, NaN below."""
    denormal = x < SMALLEST_NORMAL
    scaled = tl.where(denormal, x * TWO_23, x).to(tl.int32, bitcast=True)
    # Arithmetic on the bits: the exponent that leaves a mantissa from sqrt(1/2) on.
    exponent = (scaled - ROOT_HALF_BITS) >> 23
    f = (scaled - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    k = tl.where(denormal, exponent - 23, exponent).to(tl.float32)
    square = f * f
    rest = ((f * square) * log_polynomial(f) + k * LN2_LOW) - 0.5 * square
    value = ((f + rest) + k * LN2_HIGH).to(tl.uint32, bitcast=True)
    bits = x.to(tl.uint32, bitcast=True)
    value = tl.where(bits == INF_BITS, INF_BITS, tl.where(x == 0.0, MINUS_INF_BITS, value))
    return tl.where(x >= 0.0, value, NAN_BITS).to(tl.uint32).to(tl.float32, bitcast=True)
