"""Hypothesis strategies for tensors, models and sparsification rules, with everything in them that breaks kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastmerge.backends import reference
from fastmerge.backends.rule import TIE_BLOCK, SparsifyRule
from fastmerge.ops import keep_ties

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = {2: torch.int16, 4: torch.int32}
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 6e-8, 1e-5, math.nan, math.inf, -math.inf, 65504.0, 3.4e38, -3.4e38]

dtypes = st.sampled_from(DTYPES)
computes = st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16))
densities = st.one_of(st.sampled_from((0.5, 0.1, 0.0, 1.0, 1e-9, 0.999, 1 / 3)), st.floats(0, 1))
# (density, epsilon) of DELLA: density - epsilon > 0 and density + epsilon < 1 unless all or nothing is kept.
della_spreads = st.one_of(
    st.sampled_from(((0.5, 0.15), (0.5, 0.4999), (0.3, 0.0), (0.0, 0.15), (1.0, 0.15))),
    st.floats(0.2, 0.8).map(lambda density: (density, 0.19)),
)
words64 = st.one_of(st.integers(0, 100), st.integers(0, 2**64 - 1))
positions = st.one_of(st.integers(0, 5), st.integers(0, 4095))
# Near 2**34 the low word of the counter (index / 4) overflows into the high one.
offsets = st.one_of(st.integers(0, 9), st.integers(2**34 - 40, 2**34 + 3), st.integers(0, 2**40))


@st.composite
def shapes(draw: st.DrawFn, blocks: bool = True) -> tuple[int, ...]:
    """Mostly small and odd, sometimes empty or without dimensions, with `blocks` now and then several tie blocks."""
    kind = draw(st.integers(0, 39 if blocks else 37))
    side = st.integers(1, 13)
    if kind < 12:
        return (draw(st.integers(1, 70)),)
    if kind < 24:
        return (draw(side), draw(side))
    if kind < 28:
        return (draw(side), draw(st.integers(1, 5)), draw(side))
    if kind < 30:
        return ()
    if kind < 32:
        return draw(st.sampled_from(((0,), (0, 3), (3, 0))))
    if kind < 38:
        return (draw(st.integers(500, 1600)),)
    return (TIE_BLOCK + draw(st.integers(0, TIE_BLOCK + 9)),)


@st.composite
def values(draw: st.DrawFn, count: int, dtype: torch.dtype) -> Tensor:
    """A flat contiguous tensor: ties, specials, random bits (NaN payloads, denormals), or numbers of any scale."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    style = draw(st.sampled_from(("ties", "normal", "special", "bits", "grid", "constant")))
    if style == "bits":
        width = _INTEGERS[torch.empty((), dtype=dtype).element_size()]
        top = 2 ** (8 * width.itemsize - 1)
        return torch.randint(-top, top, (count,), generator=generator, dtype=torch.int64).to(width).view(dtype)
    if style == "normal":
        scale = 10.0 ** draw(st.integers(-42, 37))
        return (torch.randn(count, generator=generator, dtype=torch.float64) * scale).to(dtype)
    if style == "grid":
        return (torch.randint(-9, 10, (count,), generator=generator) / 64).to(dtype)
    if style == "constant":
        return torch.full((count,), draw(st.sampled_from(SPECIAL))).to(dtype)
    if style == "special":
        pool = torch.tensor(SPECIAL)
    else:
        finite = st.floats(-4, 4, width=16)
        pool = torch.tensor(draw(st.lists(finite, min_size=1, max_size=4)))
    return pool[torch.randint(0, len(pool), (count,), generator=generator)].to(dtype)


@st.composite
def laid_out(draw: st.DrawFn, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same numbers behind strides, a storage offset, or an address that is not a multiple of the element's size."""
    layout = draw(st.sampled_from(("plain", "offset", "unaligned", "strided", "transposed")))
    count = flat.numel()
    if layout == "offset":
        shift = draw(st.integers(1, 7))
        return torch.cat([flat.new_zeros(shift), flat])[shift:].view(shape)
    if layout == "unaligned" and count:
        shift = draw(st.integers(1, 15))
        memory = bytearray(shift) + bytearray(flat.view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(memory, dtype=flat.dtype, count=count, offset=shift).view(shape)
    if layout == "strided":
        wide = flat.new_full((*shape, 3), 7.0)
        wide[..., 1] = flat.view(shape)
        return wide[..., 1]
    if layout == "transposed" and len(shape) >= 2:
        return flat.view(shape).transpose(0, -1).contiguous().transpose(0, -1)
    return flat.clone().view(shape)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor of any kind."""
    shape = draw(shapes()) if shape is None else shape
    dtype = draw(dtypes) if dtype is None else dtype
    return draw(laid_out(draw(values(math.prod(shape), dtype)), shape))


@dataclass
class Models:
    """A base, or none, and models of its shape."""

    base: Tensor | None
    tensors: list[Tensor]

    @property
    def numel(self) -> int:
        return self.tensors[0].numel()


@st.composite
def models(draw: st.DrawFn, most: int = 4, blocks: bool = True) -> Models:
    """1 to `most` models: fine-tuned (close to the base, deltas full of ties and zeros) or unrelated to it."""
    shape = draw(shapes(blocks))
    count = draw(st.integers(1, most))
    base = draw(st.one_of(tensors(shape=shape), st.none()))
    close = base is not None and draw(st.booleans())
    result = []
    for _ in range(count):
        model = draw(tensors(shape=shape))
        if close:
            step = torch.nan_to_num(model.float(), 0.0, 0.0, 0.0).clamp(-1, 1)
            model = (base.float() + step).to(draw(dtypes))
        result.append(model)
    return Models(base, result)


@st.composite
def ranks(draw: st.DrawFn, count: int) -> tuple[int, int]:
    """Two ranks of a tensor of `count` elements, mostly in order."""
    return draw(st.integers(0, count)), draw(st.integers(0, count))


@st.composite
def rules(draw: st.DrawFn, given: Models, subtract: bool, compute: torch.dtype) -> SparsifyRule:
    """A rule that fits these models; its bounds come from the reference backend."""
    count = len(given.tensors)
    method = draw(st.sampled_from(("band", "bernoulli", "della", "mask", "none")))
    if method == "none":
        return SparsifyRule()
    if method == "mask":
        generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
        size = (count, -(-given.numel // 8))
        return SparsifyRule("mask", masks=torch.randint(0, 256, size, dtype=torch.uint8, generator=generator))
    if method == "band":
        pairs = [draw(ranks(given.numel)) for _ in given.tensors]
        base = given.base if subtract else None
        first, last = [p[0] for p in pairs], [p[1] for p in pairs]
        bounds, ties = reference.magnitude_bounds(base, given.tensors, first, last, compute)
        return SparsifyRule("band", bounds=keep_ties(bounds) if draw(st.booleans()) else bounds, ties_before=ties)
    spread = [draw(della_spreads) if method == "della" else (draw(densities), 0.0) for _ in range(count)]
    shape = given.tensors[0].shape
    row_length = max(1, shape[-1] if shape else 1)
    offset = draw(offsets)
    return SparsifyRule(
        method,
        density=[pair[0] for pair in spread],
        epsilon=[pair[1] for pair in spread],
        row_length=row_length,
        seed=draw(words64),
        tensor_id=draw(words64),
        positions=[draw(positions) for _ in range(count)],
        offset=offset - offset % row_length if method == "della" else offset,
    )
