"""What the frequency filter does to a matrix of one shape, found without building its mask.

Of the mask M only Ms(k) = (M(k) + M(-k)) / 2 shows in a real result. A matrix [H, W] has millions of coefficients, but
the mask is made of discs: along either axis the half spectrum falls into lines (columns or rows of coefficients) that
are dropped whole, then lines that are changed in part, then lines that are left alone. Where one begins is decided by
the comparisons of the definition itself, in float64, at the two ends of a line: distances grow from one to the other.
`official` doubles some coefficients on a ring; those on lines that are otherwise left alone are points.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Weights = NDArray[np.float64]
Singles = NDArray[np.float32]


class Mask:
    """The symmetrised mask of matrices [height, width], in parts.

    Axis 0 runs along the rows' indices (y), axis 1 along the columns' (x). A line of an axis is what belongs to one
    index of it; the half spectrum along an axis has the lines 0 .. size // 2.
    """

    def __init__(self, height: int, width: int, ratio: float, mode: str) -> None:
        self.sizes = (height, width)
        self.mode = mode
        side = min(height, width)
        # The squared distance to the disc's centre is the sum of what the two axes have of it: integers, so exact.
        if mode == "ideal":
            cutoff = ratio * side / 2
            self._limit, self._ring = cutoff * cutoff, -1
            self._squares = tuple(np.minimum(k, n - k) ** 2 for n in self.sizes for k in (np.arange(n),))
        else:
            self._limit, self._ring = ratio * side, side // 10
            self._squares = tuple((np.arange(n) - n // 2) ** 2 for n in self.sizes)
        self._points = self._ring_points()

    def _keeps(self, squared: Indices) -> NDArray[np.bool_]:
        """Whether coefficients at these squared distances are kept: on one side of a limit."""
        distance = squared.astype(np.float64)
        return distance >= self._limit if self.mode == "ideal" else np.sqrt(distance) <= self._limit

    def _values(self, squared: Indices) -> Weights:
        doubled = np.sqrt(squared.astype(np.float64)) == self._ring
        return self._keeps(squared) * (1.0 + doubled)

    def weights(self, rows: Indices, columns: Indices) -> Weights:
        """Ms at these rows and columns, float64[rows, columns]: 0, 1, 2, or with odd sides halves between."""
        (height, width), (vertical, horizontal) = self.sizes, self._squares
        here = vertical[rows][:, None] + horizontal[columns][None]
        mirrored = vertical[-rows % height][:, None] + horizontal[-columns % width][None]
        return (self._values(here) + self._values(mirrored)) / 2

    def along(self, axis: int, lines: Indices, places: Indices) -> Weights:
        """Ms on lines of an axis, float64[lines, places]."""
        return self.weights(lines, places) if axis == 0 else self.weights(places, lines).T

    def bands(self, axis: int) -> tuple[int, int]:
        """(a, b): of the half spectrum's lines along an axis [0, a) are dropped, and [a, b) changed in part.

        Lines from b on may still hold points of the ring.
        """
        size, across = self.sizes[axis], self._squares[1 - axis]
        lines = np.arange(size // 2 + 1)
        ends = [
            self._keeps(self._squares[axis][index] + end)
            for index in (lines, -lines % size)
            for end in (across.min(), across.max())
        ]
        changed = np.flatnonzero(~np.logical_and.reduce(ends))
        kept = np.flatnonzero(np.logical_or.reduce(ends))
        last = int(changed[-1]) + 1 if len(changed) else 0
        return min(int(kept[0]) if len(kept) else size // 2 + 1, last), last

    def constant(self, axis: int, lines: Indices) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """For each place along these lines: whether all of them are 0 there, and whether all are 1."""
        size, across = self.sizes[axis], self._squares[1 - axis]
        places = np.arange(self.sizes[1 - axis])
        ends = []
        for index, crossing in ((lines, across), (-lines % size, across[-places % len(places)])):
            squares = self._squares[axis][index]
            ends += [self._keeps(crossing + squares.min()), self._keeps(crossing + squares.max())]
        ones, zeros = np.logical_and.reduce(ends), ~np.logical_or.reduce(ends)
        for line, place in self.ring(axis):
            if line in lines:
                ones[place] = False
        return zeros, ones

    def limits(self, axis: int) -> Limits:
        """The mask in integers, for the lines of an axis."""
        ring = self._ring**2 if self._ring >= 0 else -1
        if self.mode == "ideal":
            least, most = math.ceil(self._limit), 1 << 62
        else:
            # The last squared distance that the definition keeps is next to the limit's square.
            near = max(0, int(self._limit * self._limit) - 3) + np.arange(7)
            least, most = 0, int(near[self._keeps(near)][-1])
        return Limits(self.sizes[axis], self.sizes[1 - axis], self.mode == "ideal", least, most, ring)

    def _ring_points(self) -> set[tuple[int, int]]:
        """Where Ms has a part of a doubled coefficient: the integer points of a circle, and their mirror images."""
        if self._ring < 0 or not self._keeps(np.array([self._ring**2]))[0]:
            return set()
        found = set()
        for down in range(self._ring + 1):
            along = math.isqrt(self._ring**2 - down**2)
            if along**2 + down**2 == self._ring**2:
                for y in (self.sizes[0] // 2 - down, self.sizes[0] // 2 + down):
                    for x in (self.sizes[1] // 2 - along, self.sizes[1] // 2 + along):
                        found |= {(y, x), (-y % self.sizes[0], -x % self.sizes[1])}
        return found

    def ring(self, axis: int) -> list[tuple[int, int]]:
        """The (line, place) of such points on the half spectrum's lines along an axis, in order."""
        places = {(point[axis], point[1 - axis]) for point in self._points}
        return sorted(place for place in places if place[0] <= self.sizes[axis] // 2)

    @property
    def even(self) -> bool:
        """Whether Ms(y, x) = Ms(-y, x): then the cosines and sines of a frequency are changed alike."""
        height, width = self.sizes
        return self.mode == "ideal" or height % 2 == 0 or width % 2 == 0 or min(height, width) == 1


@dataclass(frozen=True)
class Limits:
    """The symmetrised mask in integers, for kernels that work it out coefficient by coefficient.

    size, across: how many lines the whole spectrum has along the axis, and how many places each line has. What index k
    of n adds to a squared distance is min(k, n - k) ** 2 where `wrapped`, else (k - n // 2) ** 2; the mirrored index is
    -k % n. M is 1 where the squared distance is from `least` to `most`, but 2 where it is `ring`, and 0 elsewhere; Ms
    is the mean of M here and of M at both mirrored indices.
    """

    size: int
    across: int
    wrapped: bool
    least: int
    most: int
    ring: int

    @property
    def mirrored(self) -> bool:
        """Whether a squared distance and the mirrored one can differ."""
        return not self.wrapped and (self.size % 2 == 1 or self.across % 2 == 1)


@dataclass(frozen=True)
class Lines:
    """What is known of the half spectrum's lines along one axis.

    dropped, partial: lines [0, dropped) are 0, [dropped, partial) are changed in part. points: of each later line that
    the ring touches, its places.
    """

    axis: int
    dropped: int
    partial: int
    points: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def touched(self) -> list[int]:
        """All lines that are changed."""
        return [*range(self.partial), *(line for line, _ in self.points)]


def lines(mask: Mask, axis: int) -> Lines:
    """The lines of a mask along one axis."""
    dropped, partial = mask.bands(axis)
    points: dict[int, list[int]] = {}
    for line, place in mask.ring(axis):
        if line >= partial:
            points.setdefault(line, []).append(place)
    return Lines(axis, dropped, partial, tuple((line, tuple(places)) for line, places in points.items()))


# -- tables of the routes --------------------------------------------------------------------------------------------


def waves(mask: Mask) -> list[tuple[Singles, Singles]]:
    """What lowrank projects on: (basis, weights) of each class of frequencies fy that change.

    basis: [rank, H, or H / 2]: cosines and sines over the rows, or over the upper half of them where the frequencies
    have a parity: the lower half has the same values, or their negatives. weights: 1 - Ms, [rank, W // 2 + 1].
    """
    height, width = mask.sizes
    places, columns = np.arange(height // 2 if height % 2 == 0 else height), np.arange(width // 2 + 1)
    # The values of all cosines and sines of whole periods over the rows; the place in it is found in integers.
    circle = np.arange(height) * (2 * np.pi / height)
    cosines, sines = np.cos(circle), np.sin(circle)
    found = []
    changed = lines(mask, 0).touched
    classes = [changed] if height % 2 else [[f for f in changed if f % 2 == odd] for odd in (0, 1)]
    for frequencies in classes:
        paired = {f for f in frequencies if f not in (0, height / 2)}
        # Made row by row: whole tables in float64 would be several times as large as these.
        basis = np.empty((len(frequencies) + len(paired), len(places)), np.float32)
        weights = np.empty((len(basis), len(columns)), np.float32)
        both = [(f, cosines) for f in frequencies] + [(f, sines) for f in sorted(paired)]
        for row, (frequency, wave) in enumerate(both):
            basis[row] = wave[places * frequency % height] * np.sqrt((1 + (frequency in paired)) / height)
            weights[row] = 1 - mask.weights(np.array([frequency]), columns)[0]
        found.append((basis, weights))
    return found


def ring_tables(mask: Mask, axis: int) -> tuple[list[int], NDArray[np.complex64], Singles]:
    """(points, phases, shares): how the lines that only the ring touches are changed.

    points: these lines. phases: how a line's coefficients at the ring's places come from it, [across, places]. shares:
    what of each is added to it, [places, points].
    """
    known, across = lines(mask, axis), mask.sizes[1 - axis]
    points = [line for line, _ in known.points]
    places = np.array(sorted({place for _, each in known.points for place in each}), dtype=np.int64)
    angles = np.arange(across)[:, None] * places[None] % across * (-2 * np.pi / across)
    phases = np.exp(1j * angles) / np.sqrt(across)
    shares = mask.along(axis, np.array(points, dtype=np.int64), places).T - 1
    return points, phases.astype(np.complex64), shares.astype(np.float32)


# -- routes and what they cost ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HighpassPlan:
    """How matrices [height, width] are filtered, and at what cost.

    route: "nothing", "lowrank" or "rfft". axis: along which rfft's first transform runs: 1 along the rows, 0 down the
    columns. rank: vectors that lowrank projects on. dropped, columns: lines of the spectrum that rfft looks at no
    further, and that it transforms along the other axis. seconds: predicted, of one core of the machine that the model
    was measured on, for all matrices of the tensor. workspace: bytes beside the tensor and the result, kept tables
    included; a library's own buffers, some MB, apart.
    """

    height: int
    width: int
    ratio: float
    mode: str
    route: str
    axis: int = 1
    rank: int = 0
    dropped: int = 0
    columns: int = 0
    seconds: float = 0.0
    workspace: int = 0


@dataclass(frozen=True)
class Costs:
    """Nanoseconds, on one core or on a whole GPU.

    copy: per element of a copy. smooth: per element of a real transform and its inverse of up to 8192 numbers without
    large prime factors; longer ones cost more by a square root. prime, worst: the same for other lengths, per unit of
    the largest prime factor, and at most. moved: what else the rfft route does per element; turned: what it does more
    where the first transform runs down the columns. lined: what it does per complex number of a line along the other
    axis, the transforms apart. folded: what lowrank does per element besides its products; product: these, per element
    and vector.
    """

    copy: float
    smooth: float
    prime: float
    worst: float
    moved: float
    turned: float
    lined: float
    folded: float
    product: float

    def transforms(self, length: int) -> float:
        """A real transform of this length and its inverse, per element."""
        smooth = self.smooth * max(1.0, length / 8192) ** 0.5
        largest = _largest_prime_factor(length)
        return smooth if largest <= 13 else max(smooth, min(self.prime * largest, self.worst))


COSTS = {
    # Measured by bench/highpass.py with AVX-512 and MKL.
    "cpu": Costs(
        copy=0.6, smooth=1.4, prime=0.17, worst=25.0, moved=3.4, turned=3.0, lined=9.5, folded=2.2, product=0.02
    ),
    # From the data sheet of an H100: no GPU has measured them. lowrank reads a matrix twice and writes once; products
    # are three of TF32, at half the speed that the sheet names.
    "cuda": Costs(
        copy=0.003,
        smooth=0.015,
        prime=0.0005,
        worst=0.06,
        moved=0.015,
        turned=0.008,
        lined=0.03,
        folded=0.005,
        product=2.5e-5,
    ),
}
"""What decides between routes. They are constants, so that a matrix takes the same route, and gets the same bits,
whenever a merge is run again; only their ratios count for that, and `seconds` is as good as they fit the machine."""

BLOCK = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Elements that are worked on at a time: what the caches of two cores hold; on a GPU, enough to fill it."""


RANKS = 16
"""On a GPU a class of lowrank has a multiple of so many vectors, or of fewer; those that fill it up are zeros."""

PARTIAL_SUMS = 1 / 8
"""On a GPU sums over all rows are taken in pieces; as many floats as this share of the matrix wait to be added."""


def together(height: int, width: int) -> int:
    """How many matrices of this shape a GPU works on at a time."""
    return block(height * width, "cuda")


def block(length: int, device: str) -> int:
    """How many lines of so many elements are worked on at a time."""
    return max(1, BLOCK[device] // max(1, length))


def _largest_prime_factor(number: int) -> int:
    largest, factor = 1, 2
    while factor * factor <= number:
        while number % factor == 0:
            largest, number = factor, number // factor
        factor += 1
    return max(largest, number)


@functools.lru_cache(maxsize=1024)
def candidates(
    height: int, width: int, ratio: float, mode: str, itemsize: int = 4, device: str = "cpu"
) -> tuple[HighpassPlan, ...]:
    """The routes that lead to the result for one matrix, the fastest first."""
    mask, costs, numel = Mask(height, width, ratio, mode), COSTS[device], height * width
    down, along = lines(mask, 0), lines(mask, 1)
    settings = height, width, ratio, mode
    if not along.touched:
        return (HighpassPlan(*settings, "nothing", seconds=numel * costs.copy * 1e-9),)
    found = [_transformed(settings, each, costs, itemsize, device) for each in (along, down)]
    if mask.even:
        rank = sum(1 if line in (0, height / 2) else 2 for line in down.touched)
        folded = 2 if height % 2 == 0 else 1
        nanoseconds = numel * (costs.folded + costs.product * rank * 2 / folded)
        nanoseconds += rank * width * (costs.transforms(width) + costs.copy)
        if device == "cuda":
            filled = rank + folded * (RANKS - 1)
            # Coefficients, their spectrum, the library's copy of that, and what comes back.
            workspace = 4 * filled * (height // folded + width // 2 + 1) + 16 * filled * (width + 2)
            workspace += int(4 * numel * PARTIAL_SUMS)
        else:
            blocks = 12 * 4 * width * min(height, block(width, device))
            tables = 4 * rank * (height // folded + width // 2 + 1)
            workspace = blocks + tables + 4 * rank * width
        found.append(HighpassPlan(*settings, "lowrank", rank=rank, seconds=nanoseconds * 1e-9, workspace=workspace))
    return tuple(sorted(found, key=lambda each: each.seconds))


def _transformed(
    settings: tuple[int, int, float, str], known: Lines, costs: Costs, itemsize: int, device: str
) -> HighpassPlan:
    """The rfft route with its first transform along one axis."""
    height, width, *_ = settings
    size, across = (width, height) if known.axis == 1 else (height, width)
    columns = len(known.touched) - known.dropped
    nanoseconds = size * across * (costs.transforms(size) + costs.moved + (costs.turned if known.axis == 0 else 0))
    nanoseconds += columns * across * (2 * costs.transforms(across) + costs.lined)
    if device == "cuda":
        spectrum, matrix = 8 * across * (size // 2 + 1), 4 * size * across
        # Beside the spectrum the widened matrix and its transpose, or lines three times, or the spectrum's copy and
        # what comes back.
        workspace = spectrum + max(2 * matrix, 24 * across * columns, spectrum + matrix)
    else:
        workspace = _in_blocks(known, columns, size, across, itemsize)
    return HighpassPlan(
        *settings,
        "rfft",
        axis=known.axis,
        dropped=known.dropped,
        columns=columns,
        seconds=nanoseconds * 1e-9,
        workspace=workspace,
    )


def _in_blocks(known: Lines, columns: int, size: int, across: int, itemsize: int) -> int:
    """The bytes that the rfft route takes where it works in blocks that stay in a CPU's cache."""
    waiting = 8 * across * (size // 2 + 1 - known.partial)
    if known.axis == 1 and itemsize == 4 and waiting <= 4 * size * across:
        waiting = 0  # there is room in the result
    lines_at_once = block(size, "cpu") if known.axis == 1 else max(64, block(size, "cpu"))
    return waiting + 8 * across * columns + 8 * 4 * size * min(across, lines_at_once) + 4 * 8 * BLOCK["cpu"]


def plan(
    height: int, width: int, ratio: float, mode: str, itemsize: int = 4, device: str = "cpu", count: int = 1
) -> HighpassPlan:
    """The fastest route for `count` matrices of this shape."""
    if height * width * count == 0:
        return HighpassPlan(height, width, ratio, mode, "nothing")
    fastest = candidates(height, width, ratio, mode, itemsize, device)[0]
    at_once = min(count, together(height, width)) if device == "cuda" else 1
    return dataclasses.replace(fastest, seconds=fastest.seconds * count, workspace=fastest.workspace * at_once)
