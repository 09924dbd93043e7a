"""Random words that depend on seed, tensor, stream and place alone: `fastmerge/reference/random.py` in Triton.

Philox4x32-10 with 32-bit counters; a 64-bit counter would select another generator.
"""

import triton
import triton.language as tl


@triton.jit
def philox(block, key, tensor_low, stream):
    """The four words of each counter block.

    block: int64, flat index / 4. key: int64, the seed's low word, and its high word xor that of the tensor id.
    tensor_low, stream: int64 below 2**32, the counter's words c2 and c3.
    """
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + tensor_low.to(tl.uint32)
    c3 = tl.zeros_like(c0) + stream.to(tl.uint32)
    return tl.philox(key, c0, c1, c2, c3)


@triton.jit
def words(first, key, tensor_low, stream, BLOCK: tl.constexpr, FOURS: tl.constexpr):
    """The words of the elements first .. first + BLOCK - 1, uint32[BLOCK].

    first: int64, flat index in the whole tensor. FOURS: it is a multiple of 4, so that a counter serves four elements.
    """
    if FOURS:
        block = (first >> 2) + tl.arange(0, BLOCK // 4)
        w0, w1, w2, w3 = philox(block, key, tensor_low, stream)
        return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    else:
        index = first + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = philox(index >> 2, key, tensor_low, stream)
        lane = index & 3
        return tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
