"""Mutations of the family `highpass`: the host side, and the floors for GPUs."""

from __future__ import annotations

from checks.mutation_list.mutation import in_file

TRITON = ("tests/triton/test_highpass.py",)
ROUTES = ("tests/ops/test_highpass.py::test_every_route_on_gpus_is_within_the_tolerance",)
TABLES = ("tests/ops/test_highpass.py::test_bands_points_and_runs_are_those_of_the_whole_mask",)

MUTATIONS = [
    *in_file(
        "triton_kernels/highpass.py",
        TRITON,
        (
            "the second class has differences",
            "differences = tl.dot(tl.trans(other), above - below, differences",
            "differences = tl.dot(tl.trans(other), above + below, differences",
        ),
        ("the first class has sums", "            above = above + below\n", "            above = above - below\n"),
        ("a split ends where the rows end", "last = tl.minimum(first + span, rows)", "last = first + span"),
        ("a split ends where the next begins", "last = tl.minimum(first + span, rows)", "last = rows + 0 * span"),
        (
            "the second class lies behind the first",
            "stored(target + even_ranks.to(tl.int64) * width, rank, odd_ranks",
            "stored(target, rank, odd_ranks",
        ),
        (
            "so do its coefficients",
            "        own += even_ranks.to(tl.int64) * width\n",
            "        own += 0 * width\n",
        ),
        (
            "the lower half has the second product negated",
            "below - (alike - opposed)",
            "below - (alike + opposed)",
        ),
        ("the upper half has both", "        alike += opposed\n", "        alike += 0.0 * opposed\n"),
        (
            "a block of vectors has its own",
            "rank = program % blocks * RANKS + tl.arange(0, RANKS)",
            "rank = tl.arange(0, RANKS)",
        ),
        (
            "nothing is written beside a matrix",
            "return at, (row < rows)[:, None] & (column < columns)[None, :]",
            "return at, (row < rows)[:, None] & (column < columns + 1)[None, :]",
        ),
        (
            "the opposite of 0 is 0",
            "return tl.where(index == 0, 0, size - index)",
            "return tl.where(index == 0, size, size - index)",
        ),
        (
            "the mask is the mean of both",
            "weight = 0.5 * (weight + mask_of(opposite, least, most, ring))",
            "weight = 0.5 * (weight + weight)",
        ),
        ("the ring is doubled", "tl.where(squared == ring, 2.0, 1.0)", "tl.where(squared == ring, 1.0, 1.0)"),
        ("squares have 64 bits", "    return away.to(tl.int64) * away\n", "    return (away * away).to(tl.int64)\n"),
        ("lines are counted from the first", "line = first + owner % lines", "line = owner % lines"),
        ("indices wrap around", "away = tl.minimum(index, size - index)", "away = index"),
    ),
    *in_file(
        "fastmerge/backends/triton/highpass.py",
        TRITON,
        (
            "sums in pieces wait in little room",
            "int(rows * classes * PARTIAL_SUMS) // ranks",
            "int(2 * rows * classes * PARTIAL_SUMS) // ranks",
        ),
        ("their sum is what counts", "torch.sum(partial, dim=0, out=coefficients)", "coefficients.copy_(partial[0])"),
    ),
    *in_file(
        "fastmerge/backends/highpass_on_gpus.py",
        ROUTES,
        (
            "dropped lines are 0",
            "        spectrum[:, :, : work.dropped] = 0\n",
            "        spectrum[:, :, : work.dropped] *= 1\n",
        ),
        ("one scale undoes both transforms of a line", "work.dropped, 1 / across)", "work.dropped, 1.0)"),
        ("one scale undoes the first transforms", "1 / size, out=target)", "1.0, out=target)"),
        ("the ring's points are put back", "spectrum.index_copy_(2, work.points, ringed)", "ringed.zero_()"),
        ("a result at an odd address is written", "        out.copy_(target)\n", "        out.copy_(x)\n"),
        ("weights have the scale of their transforms", "(weights / np.float32(width))", "(weights / np.float32(1))"),
    ),
    *in_file(
        "fastmerge/backends/filters.py",
        TABLES,
        ("what is kept begins at the limit", "math.ceil(self._limit), 1 << 62", "math.ceil(self._limit) + 1, 1 << 62"),
        (
            "what is kept ends at the limit",
            "int(near[self._keeps(near)][-1])",
            "int(near[self._keeps(near)][-1]) - 1",
        ),
    ),
]
