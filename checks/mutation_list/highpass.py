"""Mutations of the family `highpass`: the host side, and the floors for GPUs."""

from __future__ import annotations

from checks.mutation_list.mutation import in_file

TRITON = ("tests/triton/test_highpass.py",)
CUDA = ("tests/cuda/test_highpass.py",)
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
    *in_file(
        "csrc/cuda/highpass.cu",
        CUDA,
        (
            "the second class has differences",
            "upper.v[k] - lower.v[k];\n        }\n        put_four(&mine.part[0]",
            "upper.v[k] + lower.v[k];\n        }\n        put_four(&mine.part[0]",
        ),
        ("all slices count", "for (int32_t s = 1; s < slices; ++s) {", "for (int32_t s = 1; s < slices - 1; ++s) {"),
        (
            "behind a sum's last row there is nothing",
            "bool there = reader() + i * kReaders < count;",
            "bool there = reader() + i * kReaders < count + (count & 1);",
        ),
        (
            "the second class has vectors of its own",
            "(class_of(x, group) == 1 ? groups_of(x.rank[0]) : 0)",
            "(class_of(x, group) == 1 ? 1 : 0)",
        ),
        ("the second class lies behind the first", "+ (which == 1 ? x.rank[0] : 0);", "+ (which == 1 ? 0 : 0);"),
        ("each sum has rows of its own", "begin = place.split * each, end", "begin = 0 * each, end"),
        (
            "blocks share the vectors",
            "place.group = static_cast<int32_t>(number % chunks) * kGroupsOnce;",
            "place.group = static_cast<int32_t>(number % chunks) * 0;",
        ),
        (
            "vectors end with their class",
            "        if (first + i >= rank) break;\n",
            "        if (first + i > rank) break;\n",
        ),
        ("of many vectors not all stay", "if (row == first || most > kDepth) stage", "if (row == first) stage"),
        (
            "later vectors have their coefficients",
            "((which == 1 ? x.rank[0] : 0) + depth + i) * x.width",
            "((which == 1 ? x.rank[0] : 0) + i) * x.width",
        ),
        ("the lower half has the second product negated", "lower.v[k] - (even - odd);", "lower.v[k] - (even + odd);"),
        (
            "a strip ends with the rows",
            "                if (pair >= last) break;\n",
            "                if (pair > last) break;\n",
        ),
        (
            "what is kept ends at the limit",
            "squared > limits.most) return 0.0f;",
            "squared >= limits.most) return 0.0f;",
        ),
        ("what is kept begins at the limit", "squared < limits.least ||", "squared <= limits.least ||"),
        ("the ring is doubled", "squared == limits.ring ? 2.0f : 1.0f;", "squared == limits.ring ? 1.0f : 1.0f;"),
        (
            "the mask is the mean of both",
            "if (limits.mirrored == 0) return here;",
            "if (limits.mirrored < 2) return here;",
        ),
        ("the opposite of 0 is 0", "{ return k == 0 ? 0 : n - k; }", "{ return k < 0 ? 0 : n - k; }"),
        (
            "pairs of places begin evenly",
            "limits.across % 2 == 0 && reinterpret_cast<uintptr_t>(lines) % 16 == 0;",
            "limits.across % 2 == 0;",
        ),
        (
            "fours begin evenly",
            "return width % 4 == 0 && reinterpret_cast<uintptr_t>(data)",
            "return width % 4 == 0 || reinterpret_cast<uintptr_t>(data)",
        ),
    ),
    *in_file(
        "fastmerge/backends/cuda/highpass.py",
        CUDA,
        ("the sums are added up", "torch.sum(sums, dim=0, out=coefficients)", "coefficients.copy_(sums[0])"),
        (
            "lines are counted from the first one given",
            "lines.shape[0], first, lines.shape[1], scale)",
            "lines.shape[0], 0, lines.shape[1], scale)",
        ),
    ),
]
