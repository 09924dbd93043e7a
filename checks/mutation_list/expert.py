"""Mutations of the family `expert` on the floors for GPUs."""

from __future__ import annotations

from checks.mutation_list.mutation import in_file

TRITON = ("tests/triton/test_expert.py", "tests/ops/test_expert.py::test_apply_and_revert[triton]")

MUTATIONS = [
    *in_file(
        "triton_kernels/expert.py",
        TRITON,
        (
            "the last part that holds a place owns it",
            "        owned = owned & (also == 0)\n",
            "        owned = owned & (also <= 1)\n",
        ),
        (
            "a column beyond its row names no place",
            "owned = there & (column >= 0) & (column < tl.load(part + WIDTH))",
            "owned = there & (column >= 0)",
        ),
        (
            "a negative column names no place",
            "owned = there & (column >= 0) & (column < tl.load(part + WIDTH))",
            "owned = there & (column < tl.load(part + WIDTH))",
        ),
        ("rows are counted from the block's first one", "row = first_row + (", "row = first_row * 0 + ("),
        (
            "the first row may begin before the block",
            "(start - first_row * kept).to(tl.uint32) + index",
            "(start * 0).to(tl.uint32) + index",
        ),
        ("an entry is looked for in its own row", "    start = row * kept\n", "    start = row * 0\n"),
        ("what is looked for may be the last", "low < kept.to(tl.int32))\n", "low < kept.to(tl.int32) - 1)\n"),
        (
            "a part replaces where its value is not 0",
            "counts = also & (values_of(other, place, also, False, False) != 0.0)",
            "counts = also",
        ),
        (
            "its own value replaces where it is not 0",
            "total = tl.where(value != 0.0, base_values_of(part, entry, owned, WHOLE, ALIGNED), total)",
            "total = base_values_of(part, entry, owned, WHOLE, ALIGNED)",
        ),
        (
            "the parts before save their old bits, too",
            "numbers.FLOAT32, place, old, also, False)",
            "numbers.FLOAT32, place, old + 1, also, False)",
        ),
        (
            "the sum goes from left to right",
            "return rounded(total + value * tables.float_of(tl.load(part + SCALE)), dtype)",
            "return rounded(widened(old, dtype) + (value * tables.float_of(tl.load(part + SCALE)) + "
            "(total - widened(old, dtype))), dtype)",
        ),
        ("float16 is widened as such", "return tl.where(dtype == numbers.FLOAT16, half, whole)", "return whole"),
        (
            "values have their own dtype",
            "    dtype = dtype_of(part, 1)\n",
            "    dtype = dtype_of(part, 0)\n",
        ),
        (
            "the base's values have their own dtype",
            "    dtype = dtype_of(part, 2)\n",
            "    dtype = dtype_of(part, 1)\n",
        ),
        (
            "wide columns have 32 bits",
            "tl.load(part + WIDE_COLUMNS) != 0, entry",
            "tl.load(part + WIDE_COLUMNS) > 1, entry",
        ),
        (
            "what was changed is counted for its tensor",
            "changed + tl.load(table + number * FIELDS + NUMBER)",
            "changed",
        ),
        ("a refusal writes nothing", "    if tl.load(any) == 0:\n", "    if tl.load(any) >= 0:\n"),
    ),
    *in_file(
        "fastmerge/backends/triton/expert.py",
        TRITON,
        (
            "what had to be copied gets what was written",
            "                x.copy_(copy.view(x.shape))\n",
            "                x.copy_(x.clone())\n",
        ),
        (
            "columns are halved often enough",
            "part.columns.shape[1].bit_length())",
            "part.columns.shape[1].bit_length() - 1)",
        ),
        ("parts of a tensor follow one another", "begin[part.of], end[part.of]", "begin[part.of], begin[part.of] + 1"),
    ),
]
