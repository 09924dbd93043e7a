"""Random words that depend on the seed, the tensor's name, the stream and the element's place, and on nothing else.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Element g of a tensor (flat
row-major index in the whole tensor) gets output word g % 4 of the counter

    c0 = low32(g / 4)   c1 = high32(g / 4)   c2 = low32(tensor id)   c3 = stream id

under the key k0 = low32(seed), k1 = high32(seed) xor high32(tensor id).
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF

# What a stream of random words is for: the top 4 bits of its stream id.
BERNOULLI = 0
DELLA = 1
HASHED_TIES = 2
BLEND_TRIAL = 3
DE_TRIAL = 4


def stream_id(purpose: int, position: int = 0, generation: int = 0) -> int:
    """Pack a stream's purpose (4 bits), generation (16 bits) and the model's position (12 bits), high to low."""
    return purpose << 28 | (generation & 0xFFFF) << 12 | (position & 0xFFF)


def philox4x32(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds of Philox4x32: four counter words in, four random words out, each 32 bits in an int64 tensor."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap into the sign bit; masking after the shift gives the unsigned halves again.
        product0 = c0 * 0xD2511F53
        product1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32 & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            (product0 >> 32 & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0 = k0 + 0x9E3779B9 & MASK32
        k1 = k1 + 0xBB67AE85 & MASK32
    return [c0, c1, c2, c3]


def blocks(block: Tensor, seed: int, tensor_id: int, stream: int) -> Tensor:
    """The four words of each counter block, int64[len(block), 4]."""
    counter = [
        block & MASK32,
        block >> 32 & MASK32,
        torch.full_like(block, tensor_id & MASK32),
        torch.full_like(block, stream),
    ]
    key = (seed & MASK32, (seed >> 32 & MASK32) ^ (tensor_id >> 32 & MASK32))
    return torch.stack(philox4x32(counter, key), dim=1)


def words(
    offset: int, count: int, *, seed: int, tensor_id: int, stream: int, device: torch.device | None = None
) -> Tensor:
    """The words of the elements offset .. offset + count - 1, int64[count]."""
    first = offset // 4
    block = torch.arange(first, (offset + count + 3) // 4, dtype=torch.int64, device=device)
    return blocks(block, seed, tensor_id, stream).reshape(-1)[offset - 4 * first :][:count]


def words_at(index: Tensor, *, seed: int, tensor_id: int, stream: int) -> Tensor:
    """The words of single elements, given by flat index; int64, as long as `index`."""
    return blocks(index // 4, seed, tensor_id, stream).gather(1, (index % 4)[:, None])[:, 0]


def threshold(probability: Tensor) -> Tensor:
    """floor(p * 2**32) of float64 probabilities: an element is kept when its word is less."""
    return torch.floor(probability * 4294967296.0).clamp(0, 4294967296.0).to(torch.int64)
