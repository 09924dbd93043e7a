"""Mutations of the family `expert` on the floors for GPUs."""

from __future__ import annotations

from checks.mutation_list.mutation import in_file

TRITON = ("tests/triton/test_expert.py", "tests/ops/test_expert.py::test_apply_and_revert[triton]")
CUDA = ("tests/cuda/test_expert.py", "tests/ops/test_expert.py::test_apply_and_revert[cuda]")

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
            "counts = also & (values_of(other, place, also, False, 1) != 0.0)",
            "counts = also",
        ),
        (
            "its own value replaces where it is not 0",
            "total = tl.where(value != 0.0, base_values_of(part, entry, owned, WHOLE, ALIGN), total)",
            "total = base_values_of(part, entry, owned, WHOLE, ALIGN)",
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
            "                x.copy_(copy)\n",
            "                x.copy_(x.clone())\n",
        ),
        (
            "columns are halved often enough",
            "part.columns.shape[1].bit_length())",
            "part.columns.shape[1].bit_length() - 1)",
        ),
        ("parts of a tensor follow one another", "begin[part.of], end[part.of]", "begin[part.of], begin[part.of] + 1"),
    ),
    *in_file(
        "csrc/cuda/expert.cu",
        CUDA,
        ("a part begins with its first block", "parts[at].first_block <= block()", "parts[at].first_block < block()"),
        (
            "a part is looked for at 32 places",
            "low += (count_bits(before) - 1) * step;",
            "low += count_bits(before) > 1 ? step : 0;",
        ),
        (
            "a row may begin before its block",
            "(some.place + static_cast<uint32_t>(entry - some.first))",
            "(0 * some.place + static_cast<uint32_t>(entry - some.first))",
        ),
        ("a column beyond its row is nowhere", "return column < static_cast<uint64_t>(part.width);", "return true;"),
        (
            "a place has one owner",
            "        if (entry_at(parts[p], row, column) >= 0) return false;\n",
            "        if (entry_at(parts[p], row, column) < -1) return false;\n",
        ),
        (
            "zeros do not replace where experts meet",
            "if (at >= 0 && expert_replaces(load_value(values_of(parts[p]), at)))",
            "if (at >= 0)",
        ),
        (
            "zeros do not replace alone",
            "if (replaces && expert_replaces(given))",
            "if (replaces)",
        ),
        (
            "all parts keep the old bits",
            "if (kMode == kApply) store_bits(parts[p].saved,",
            "if (kMode == kApply && p == own) store_bits(parts[p].saved,",
        ),
        (
            "parts are added from the first on",
            "total = expert_add(total, load_value",
            "total = expert_add(0 * total, load_value",
        ),
        ("what has been changed is not put back", "changed[tensors] != 0) return;", "changed[tensors] < 0) return;"),
        ("each tensor has a count", "&changed[part.tensor]", "&changed[0]"),
        (
            "the last round ends with the block's entries",
            "if (begin + e * kThreads >= some.end || !in_row",
            "if (begin + e * kThreads >= some.end + 64 || !in_row",
        ),
        ("addresses may be odd", "static_cast<uintptr_t>(size - 1)) == 0;", "static_cast<uintptr_t>(0)) == 0;"),
    ),
    *in_file(
        "fastmerge/backends/cuda/expert.py",
        CUDA,
        ("the parts of a tensor end with it", "first, ends[part.of], part.of", "first, len(given), part.of"),
        ("bytes between the parts are 0", "saved = torch.zeros(", "saved = torch.ones("),
    ),
]
