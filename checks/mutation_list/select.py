"""Mutations of the family `select` in Triton and in CUDA C++."""

from __future__ import annotations

from checks.mutation_list.mutation import cuda, equal_bits, in_file

MUTATIONS = [
    *in_file(
        "triton_kernels/select.py",
        ("tests/triton/test_select.py", *equal_bits("topk_mask", "magnitude_bounds", "consensus_apply")),
        ("a tie is past a bound from the c-th on", "if before >= ties:", "if before >= ties - 1:"),
        ("the c-th tie is in its tile", "elif before + count > ties:", "elif before + count > ties + 1:"),
        (
            "ties are counted from 0",
            "ordinal = tl.cumsum(tied.to(tl.int32), axis=0) - 1",
            "ordinal = tl.cumsum(tied.to(tl.int32), axis=0)",
        ),
        ("ties before the tile count", "(ordinal >= (ties - before).to(tl.int32))", "(ordinal >= ties.to(tl.int32))"),
        ("a key equal to a bound is not past it", "    result = key < limit", "    result = key <= limit"),
        (
            "ties of earlier blocks are all past",
            "limit = tl.minimum(threshold - 1 + all_past.to(tl.int64), NOWHERE)",
            "limit = tl.minimum(threshold - 1, NOWHERE)",
        ),
        (
            "the first key that is past",
            "limit = tl.minimum(threshold - 1 + all_past",
            "limit = tl.minimum(threshold + all_past",
        ),
        (
            "a block that a cut goes through is walked",
            "| ((block + 1 < blocks) & (after <= ties))",
            "| (block + 1 < blocks)",
        ),
        (
            "the last block is walked",
            "| ((block + 1 < blocks) & (after <= ties))",
            "| (after <= ties) | (block + 1 >= blocks)",
        ),
        (
            "a block's ties are past only where enough came before",
            "all_past = (ties > 0) & (before >= ties)",
            "all_past = (ties > 0) & (before + 1 >= ties)",
        ),
        ("the band's upper end", "(key <= first) & (key > last)", "(key < first) & (key > last)"),
        ("the band's lower end", "(key <= first) & (key > last)", "(key <= first) & (key >= last)"),
        (
            "masks do not write past the end",
            "tl.store(out + start + place, kept.to(tl.uint8), mask=place < stop - start)",
            "tl.store(out + start + place, kept.to(tl.uint8))",
        ),
        ("the mask's second row of ties", "ties_before + blocks, block, blocks)", "ties_before, block, blocks)"),
        ("ties within a block add up", "            first_before += equal_first\n", ""),
    ),
    *in_file(
        "triton_kernels/select.py",
        (
            "tests/ops/test_equal_bits.py::test_a_nan_is_one_key_whatever_it_carries",
            "tests/triton/test_select.py",
            *equal_bits("magnitude_bounds", "kth_magnitude", "abs_histogram"),
        ),
        ("float16 NaN has one key", "tl.where(bits > 0x7C00, 0x7E00, bits)", "bits"),
        (
            "float16 keys widen",
            "value = key.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)",
            "value = (key << 13).to(tl.int32).to(tl.float32, bitcast=True)",
        ),
        ("bfloat16 keys widen", "        return key << 16\n", "        return key << 15\n"),
        ("what is past the end has no key", "tl.where(tl.arange(0, BLOCK) < stop - start, key, -1)", "key"),
        (
            "the last element has a key",
            "tl.where(tl.arange(0, BLOCK) < stop - start, key, -1)",
            "tl.where(tl.arange(0, BLOCK) < stop - start - 1, key, -1)",
        ),
        (
            "keys are those of deltas",
            "delta = numbers.difference(numbers.loaded(base, start, stop, BLOCK, WHOLE), value, True, COMPUTE)",
            "delta = value",
        ),
        ("deltas are rounded", "value, True, COMPUTE)", "value, True, numbers.FLOAT32)"),
        ("only keys with the prefix count", "mask=(key >> (SHIFT + WIDTH)) == prefix)", "mask=key >= 0)"),
        (
            "only keys that are there count",
            "tl.histogram(digit, 1 << WIDTH, mask=key >= 0)",
            "tl.histogram(digit, 1 << WIDTH)",
        ),
        (
            "a digit has its bits",
            "digit = (key >> SHIFT) & ((1 << WIDTH) - 1)",
            "digit = (key >> (SHIFT + 1)) & ((1 << WIDTH) - 1)",
        ),
        (
            "whole tiles are counted",
            "counted += digit_counts(key, prefix, SHIFT, WIDTH, FIRST, True)",
            "counted = digit_counts(key, prefix, SHIFT, WIDTH, FIRST, True)",
        ),
        ("the rest is counted", "counted += digit_counts(key, prefix, SHIFT, WIDTH, FIRST, False)", "counted += 0"),
        (
            "a rank of a tensor's end is not looked for",
            "if TOGETHER or (rank > 0 and rank < length):",
            "if TOGETHER or (rank > 0 and rank < length - 1):",
        ),
        (
            "the digit that holds the rank",
            "here = (above < rank) & (rank <= above + equal)",
            "here = (above <= rank) & (rank < above + equal)",
        ),
        ("counts are cleared for the next digit", "    tl.store(counts + digit, tl.zeros_like(equal))\n", ""),
        (
            "the rank that remains",
            "return where, rank - tl.sum(tl.where(here, above, 0), axis=0), ",
            "return where, rank, ",
        ),
        (
            "the prefix grows by each digit",
            "tl.store(state + 2 * row, prefix << WIDTH | digit)",
            "tl.store(state + 2 * row, digit)",
        ),
        ("a bound before all", "tl.where(rank <= 0, models * 0 + ABOVE_ALL_KEYS, models * 0)", "models * 0"),
        ("a cut between groups has no ties", "ties = tl.where(remaining < equal, remaining, 0)", "ties = remaining"),
        (
            "ties before a block do not include its own",
            "before + tl.cumsum(tied, axis=0) - tied, mask=inside)",
            "before + tl.cumsum(tied, axis=0), mask=inside)",
        ),
        ("ties of earlier blocks add up", "        before += tl.sum(tied, axis=0)\n", ""),
        (
            "the last digit of a single magnitude",
            "key = wide_key(tl.load(state) << WIDTH | digit, KIND)",
            "key = wide_key(tl.load(state) << WIDTH, KIND)",
        ),
    ),
    *in_file(
        "triton_kernels/select.py",
        (
            "tests/ops/test_equal_bits.py::test_a_window_has_its_first_key_and_not_the_one_after_its_last",
            "tests/triton/test_select.py",
            *equal_bits("abs_histogram", "key_histogram", "key_window", "tie_counts"),
        ),
        (
            "the least place of a tile is counted",
            "tl.atomic_add(counts + least, tl.sum((place == least).to(tl.int32), axis=0)",
            "tl.atomic_add(counts + least, tl.sum((place < least).to(tl.int32), axis=0)",
        ),
        ("a tile of equal keys is counted once", "        if greatest > least:", "        if greatest >= least:"),
        (
            "places between are counted",
            "between = counted & (place > least) & (place < greatest)",
            "between = counted & (place > least + 1) & (place < greatest)",
        ),
        ("only counted places are between", "between = counted & (place > least)", "between = (place > least - 1)"),
        (
            "a model's own prefix",
            "counted = (key >> (SHIFT + WIDTH)) == prefix",
            "counted = (key >> (SHIFT + WIDTH)) >= prefix",
        ),
        (
            "programs take turns with their row's copies",
            "block % copies.to(tl.int64)) << WIDTH)",
            "block % (copies.to(tl.int64) + 1)) << WIDTH)",
        ),
        (
            "a window begins at its first key",
            "inside = (place >= 0) & (place < width)",
            "inside = (place > 0) & (place < width)",
        ),
        (
            "a window ends before its width",
            "inside = (place >= 0) & (place < width)",
            "inside = (place >= 0) & (place <= width)",
        ),
        (
            "keys past the window",
            "tl.sum((place >= width).to(tl.int32), axis=0)",
            "tl.sum((place > width).to(tl.int32), axis=0)",
        ),
        (
            "a window past all keys",
            "low = tl.minimum(tl.load(entry + 1), 0x7FFFFFFF).to(tl.int32)",
            "low = tl.load(entry + 1).to(tl.int32)",
        ),
        (
            "a row of a window has one more number",
            "mine = counts + tl.load(entry + 2) * (width + 1)",
            "mine = counts + tl.load(entry + 2) * width",
        ),
        (
            "only bounds with ties count",
            "first = tl.where(tl.load(bound + 1) > 0, tl.load(bound), -2)",
            "first = tl.where(tl.load(bound + 1) >= 0, tl.load(bound), -2)",
        ),
        (
            "the second bound counts",
            "last = tl.where(tl.load(bound + 3) > 0, tl.load(bound + 2), -2)",
            "last = tl.where(tl.load(bound + 1) > 0, tl.load(bound + 2), -2)",
        ),
        (
            "ties of both bounds are told apart",
            "tl.store(out + (2 * row + 1) * blocks + block, tl.sum(at_last, axis=0)",
            "tl.store(out + (2 * row + 1) * blocks + block, tl.sum(at_first, axis=0)",
        ),
    ),
    *in_file(
        "csrc/cuda/select.cu",
        cuda("select", "abs_histogram", "magnitude_bounds", "tie_counts", "topk_mask", "key_window", "key_histogram"),
        (
            "a warp of equal keys counts all",
            "if (lane() == 0) add<kInside>(bins, two[0] >> 16, 32 * kEach);",
            "if (lane() == 0) add<kInside>(bins, two[0] >> 16, kEach);",
        ),
        ("keys past the end are none", "keys[t] = at + t < end ? keys[t] : kNoKey;", "keys[t] = keys[t];"),
        (
            "what is not in shared memory is counted elsewhere",
            "    } else {\n        add_global(bins, bin, times);\n    }\n}",
            "    }\n}",
        ),
        ("signs are no part of a key", "words[i] & 0x7fff7fffu", "words[i] & 0x7fffffffu"),
        (
            "equals before the cut are not past it",
            "(is_last && nth_last >= last.ties)",
            "(is_last && nth_last > last.ties)",
        ),
        ("keys below a window are not counted", "|| keys[t] < low) continue;", ") continue;"),
        ("equals of other parts come before", "(source, tie_block * kTieBlock, end,", "(source, begin, end,"),
    ),
]
