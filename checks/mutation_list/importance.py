"""Mutations of the family `importance`: of its definition, of its kernels for GPUs, of what methods make of it."""

from __future__ import annotations

from checks.mutation_list.mutation import in_file

DEFINITION = ("tests/reference/test_importance.py",)
METHODS = ("tests/methods/test_importance.py",)
DRAWN = ("nearswap", "ram", "variances_and_energies", "divergences_and_importances")
ENERGIES = (
    "tests/triton/test_importance.py::test_energies_of_all_sizes",
    "tests/triton/test_importance.py::test_a_window_begins_at_the_first_tile",
)
ROWS = (
    "tests/triton/test_importance.py::test_rows_of_all_lengths",
    "tests/triton/test_importance.py::test_each_long_row_has_memory_of_its_own",
)
MODELS = (
    "tests/triton/test_importance.py::test_models_by_value_and_by_a_table",
    "tests/ops/test_importance.py::test_a_sum_of_factors_may_be_minus_zero[triton]",
)
CUDA = (
    "tests/cuda/test_importance.py",
    "tests/ops/test_importance.py::test_a_sum_of_factors_may_be_minus_zero[cuda]",
    *(f"tests/ops/test_importance.py::test_{name}[cuda]" for name in DRAWN),
)
LOGARITHM = (
    "tests/reference/test_functions.py::test_log_at_its_ends",
    "tests/reference/test_functions.py::test_log_loses_nothing_near_one",
    "tests/reference/test_functions.py::test_the_distance_to_the_exact_value",
    "tests/reference/test_functions.py::test_nan_stays_nan",
)

MUTATIONS = [
    *in_file(
        "fastmerge/reference/importance.py",
        DEFINITION,
        ("nearswap: the least distance", "torch.where(distance < nearest, nearest, distance)", "distance"),
        (
            "nearswap: a weight is at least 0",
            "torch.where(weight < 0.0, 0.0, torch.where",
            "torch.where(weight < -9e9, 0.0, torch.where",
        ),
        ("nearswap: a weight is at most 1", "torch.where(weight > 1.0, 1.0, weight)", "weight"),
        ("nearswap: the model gets the weight", "weight * b + (1.0 - weight) * a", "weight * a + (1.0 - weight) * b"),
        ("ram: epsilon itself takes no part", "[~(d.abs() <= least) for", "[~(d.abs() < least) for"),
        ("ram: NaN takes part", "[~(d.abs() <= least) for", "[d.abs() > least for"),
        ("ram: shared is more than one", "(p & (count > 1))", "(p & (count > 0))"),
        ("ram: lone is one", "(p & (count == 1))", "(p & (count <= 2))"),
        (
            "ram: the factor is for lone changes",
            "torch.where(count == 1.0, total * factor",
            "torch.where(count >= 1.0, total * factor",
        ),
        ("ram: nothing is divided by 0", "torch.where(count < 1.0, 1.0, count)", "count"),
        (
            "ram: the mean is over those that take part",
            "total / torch.where(count < 1.0, 1.0, count)",
            "total / len(tensors)",
        ),
        ("variance: about the mean", "apart = [e - mean for e in shifted]", "apart = shifted"),
        ("variance: exactly 0 where all agree", "shifted = [d - deltas[0] for d in deltas]", "shifted = deltas"),
        ("variance: over the number of models", "(a * a for a in apart) / models)", "(a * a for a in apart))"),
        ("energy: of what is kept", "kept = d if mask is None else d[unpacked(mask, d.numel())]", "kept = d"),
        ("a mask's low bit comes first", "(mask[:, None] >> places & 1)", "(mask[:, None] >> (7 - places) & 1)"),
        ("row sums: halves of powers of two", "half = 1 << ((width - 1).bit_length() - 1)", "half = (width + 1) // 2"),
        ("shares: the greatest is taken off", "powers = exp(x - x.amax(dim=1, keepdim=True))", "powers = exp(x)"),
        ("shares: none is 0", " + _float32(SMALLEST_SHARE, x)", " + _float32(0.0, x)"),
        ("divergence: nothing cancels", "torch.where(z.abs() <= NEAR, near,", "torch.where(z.abs() <= -1.0, near,"),
        ("divergence: the terms q - p", "p * log(p / q) - apart)", "p * log(p / q))"),
        ("divergence: the series' factor", "(p / q) * log_polynomial(z)", "log_polynomial(z)"),
        ("importance: the row's divergence", "rows * divergence[:, None]", "rows * divergence.mean()"),
    ),
    *in_file(
        "fastmerge/reference/functions.py",
        LOGARITHM,
        (
            "log: denormals are scaled",
            "bits = torch.where(denormal, x * TWO_23, x)",
            "bits = torch.where(denormal, x, x)",
        ),
        (
            "log: the mantissa begins at the root of 1/2",
            "exponent = (bits - ROOT_HALF_BITS) >> MANTISSA_BITS",
            "exponent = (bits - 0x3F800000) >> MANTISSA_BITS",
        ),
        ("log: the square", " - 0.5 * square\n", " - 0.499999 * square\n"),
        ("log: the low part of ln 2", " + k * LN2_LOW)", ")"),
        (
            "log: 0 and infinity",
            "value = torch.where(x == 0.0, -INFINITY, torch.where(x == INFINITY, INFINITY, value))",
            "value = value + 0.0",
        ),
        ("log: NaN below 0", "torch.where((x < 0.0) | x.isnan(), NAN, value)", "torch.where(x.isnan(), NAN, value)"),
        ("log: NaN stays", "torch.where((x < 0.0) | x.isnan(), NAN, value)", "torch.where(x < 0.0, NAN, value)"),
    ),
    *in_file(
        "triton_kernels/importance.py",
        ("tests/ops/test_importance.py::test_nearswap[triton]",),
        ("the least distance", "tl.where(distance < SMALLEST_DISTANCE, SMALLEST_DISTANCE, distance)", "distance"),
        ("a weight is at least 0", "tl.where(weight < 0.0, 0.0, tl.where", "tl.where(weight < -9e9, 0.0, tl.where"),
        ("a weight is at most 1", "tl.where(weight > 1.0, 1.0, weight)", "weight"),
        ("the model gets the weight", "weight * own + (1.0 - weight) * based", "weight * based + (1.0 - weight) * own"),
    ),
    *in_file(
        "triton_kernels/importance.py",
        MODELS,
        ("NaN takes part", "return (magnitude(delta) <= epsilon) == 0", "return magnitude(delta) > epsilon"),
        ("epsilon itself takes no part", "(magnitude(delta) <= epsilon)", "(magnitude(delta) < epsilon)"),
        ("a magnitude has no sign", "& 0x7FFFFFFF).to(tl.float32", "& 0xFFFFFFFF).to(tl.float32"),
        ("sums begin with -0", "return tl.zeros_like(like) * -1.0", "return tl.zeros_like(like)"),
        ("nothing is divided by 0", "tl.where(count < 1.0, 1.0, count)", "count"),
        (
            "the factor is for lone changes",
            "tl.where(count == 1.0, total * factor",
            "tl.where(count >= 1.0, total * factor",
        ),
        ("a table has two numbers for each", "tl.load(listed + 2 * i), DTYPE", "tl.load(listed + i), DTYPE"),
        ("factors come out of the table", "tables.float_of(tl.load(listed + 2 * i + 1))", "1.5"),
        ("shared is more than one", "by_lanes(parts[i] & (count > 1))", "by_lanes(parts[i] & (count > 0))"),
        ("lone is one", "by_lanes(parts[i] & (count == 1))", "by_lanes(parts[i] & (count <= 2))"),
        (
            "of a table, too",
            "tl.sum((part & (count == 1)).to(tl.int32), axis=0))",
            "tl.sum((part & (count <= 2)).to(tl.int32), axis=0))",
        ),
        ("counts are of all tiles", "shared = state[2 * i] + by_lanes", "shared = by_lanes"),
        (
            "counts have an end",
            "        if whole < end:\n            # Past",
            "        if whole < 0:\n            # Past",
        ),
        ("variances are about the mean", "apart = (rows[i] - rows[0]) - mean", "apart = rows[i] - rows[0]"),
        ("exactly 0 where all agree", "mean = mean + (rows[i] - rows[0])", "mean = mean + rows[i]"),
        (
            "of a table, too, about the first one",
            "first = listed_delta(based, listed, 0,",
            "first = listed_delta(based, listed, 1,",
        ),
    ),
    *in_file(
        "triton_kernels/importance.py",
        ENERGIES,
        ("energies are of squares", "exact.parts(delta * delta)", "exact.parts(delta)"),
        (
            "energies are of what is kept",
            "tl.where(sparsify.masked(mask, start, n, BLOCK, WHOLE), mantissa, 0)",
            "mantissa",
        ),
        (
            "the second window ends where the first begins",
            "low_unit = tl.maximum(unit - BELOW, 0)",
            "low_unit = tl.maximum(unit - BELOW - 1, 0)",
        ),
        (
            "what fits no window is noticed",
            "tl.where(fits | fits_low, 0, mantissa)",
            "tl.where(fits | fits_low, 0, 0)",
        ),
        (
            "both windows count",
            " + exact.in_limbs(low_slots, tl.maximum(unit - BELOW, 0))",
            "",
        ),
        ("each model has its sums", "(model * exact.COPIES + copy) * exact.ROW", "copy * exact.ROW"),
    ),
    *in_file(
        "triton_kernels/importance.py",
        ROWS,
        (
            "halves, the upper one first",
            "(ROWS, 2, WIDTH >> (i + 1))), axis=1)",
            "(ROWS, WIDTH >> (i + 1), 2)), axis=2)",
        ),
        (
            "past a row's end there is nothing",
            "total = halved(or_nothing(powers, there), ROWS, WIDTH, HALVINGS)",
            "total = halved(powers, ROWS, WIDTH, HALVINGS)",
        ),
        ("the greatest is taken off", "powers = functions.exp(x - most[:, None])", "powers = functions.exp(x)"),
        (
            "no share is 0",
            "tl.broadcast_to(total[:, None], (ROWS, WIDTH))) + SMALLEST_SHARE",
            "tl.broadcast_to(total[:, None], (ROWS, WIDTH)))",
        ),
        ("nothing cancels", "tl.where(magnitude(z) <= NEAR, near,", "tl.where(magnitude(z) <= 0.0, near,"),
        ("the terms q - p", "p * functions.log(ratio) - apart)", "p * functions.log(ratio))"),
        ("rows past the last are not stored", "numbers.canonical(sums), mask=row < rows)", "numbers.canonical(sums))"),
        ("NaN has no payload", "numbers.canonical(sums), mask=row < rows)", "sums, mask=row < rows)"),
        (
            "NaN of long rows, too",
            "numbers.canonical(halved_in_memory(halves, tiles, WIDTH, HALVINGS))",
            "halved_in_memory(halves, tiles, WIDTH, HALVINGS)",
        ),
        ("tiles are halved from the middle", "tl.load(at + tiles * WIDTH))", "tl.load(at + WIDTH))"),
        (
            "a long row's second half",
            "powers_of(x, tile + tiles, length, most, WIDTH)",
            "powers_of(x, tile, length, most, WIDTH)",
        ),
        (
            "a long row's greatest is that of all tiles",
            "range(0, (length + (WIDTH - 1)) // WIDTH)",
            "range(0, length // WIDTH)",
        ),
        ("each program has its memory", "halves = memory + program * (tiles * WIDTH)", "halves = memory"),
        ("rows go on in the next launch", "row = first.to(tl.int64) + program", "row = program"),
        (
            "a row ends within a tile",
            "row = row + (lane >= (row + 1) * length - start).to(tl.int64)",
            "row = row + (lane > (row + 1) * length - start).to(tl.int64)",
        ),
        ("importances of short rows", "row = (start + lane) // length", "row = start // length + lane // length"),
    ),
    *in_file(
        "triton_kernels/functions.py",
        ("tests/triton/test_shared.py::test_functions_have_the_references_bits",),
        ("log: denormals are scaled", "tl.where(denormal, x * TWO_23, x)", "tl.where(denormal, x, x)"),
        ("log: 0 is -infinity", "tl.where(x == 0.0, MINUS_INF_BITS, value)", "value"),
        (
            "log: infinity stays",
            "tl.where(bits == INF_BITS, INF_BITS, tl.where",
            "tl.where(bits == 0, INF_BITS, tl.where",
        ),
        ("log: NaN below 0", "tl.where(x >= 0.0, value, NAN_BITS)", "value"),
        ("log: the low part of ln 2", " + k * LN2_LOW) - 0.5", ") - 0.5"),
    ),
    *in_file(
        "csrc/cuda/importance.cu",
        CUDA,
        ("the next model is loaded", "load_raw<true>(model_of(models, m + 1)", "load_raw<true>(model_of(models, m)"),
        (
            "sums begin with -0",
            "changed[t] = total[t] = factor[t] = -0.0f;",
            "changed[t] = total[t] = factor[t] = 0.0f;",
        ),
        ("the factor is the model's", "float own = merge.factor[m];", "float own = merge.factor[0];"),
        ("shared is more than one", "changed[t] > 1 ? part : part << 16", "changed[t] > 0 ? part : part << 16"),
        ("a block's counts begin as 0", "mine.of_block[thread()] = 0;", "mine.of_block[0] = 0;"),
        (
            "counts are added to",
            "atomic_add(&args.counts[thread()], static_cast<int64_t>(found));",
            "args.counts[thread()] = found;",
        ),
        ("counts of a warp's halves", "shared_and_alone & 0xffffu", "shared_and_alone & 0xffu"),
        (
            "variances are about the mean",
            "float apart = (delta[t] - first[t]) - mean[t];",
            "float apart = delta[t] - first[t];",
        ),
        ("exactly 0 where all agree", "mean[t] = mean[t] + (delta[t] - first[t]);", "mean[t] = mean[t] + delta[t];"),
        (
            "rows end within a thread",
            "if (at + t >= next && at + t < models.numel)",
            "if (at + t > next && at + t < models.numel)",
        ),
        ("every row's end is found", "next += args.width;\n            }", "next += 8 * args.width;\n            }"),
        (
            "past a row's end there is nothing",
            "return i < rows.width ? value(i) : -0.0f;",
            "return i < rows.width ? value(i) : 1.0f;",
        ),
        (
            "a row's second half",
            "value_or_nothing(rows, i + rows.half, value)",
            "value_or_nothing(rows, i + 2 * rows.half, value)",
        ),
        ("halves wait for each other", "half >= 32; half /= 2) {\n        sync();", "half >= 32; half /= 2) {"),
        (
            "halves of 32",
            "for (int half = 16; half > 0; half /= 2) sum",
            "for (int half = 1; half < 32; half *= 2) sum",
        ),
        (
            "the greatest of all warps",
            "for (int warp = 0; warp < kWarps; ++warp) most",
            "for (int warp = 0; warp < 1; ++warp) most",
        ),
        ("no share is 0", " / of.sum + kSmallestShare;", " / of.sum;"),
        ("rows go on in the next launch", "int64_t row = rows.first + block();", "int64_t row = block();"),
        ("each block has its memory", "rows.memory + block() * rows.half", "rows.memory"),
        (
            "half a row is as much as is needed",
            "while (2 * half < width) half *= 2;",
            "while (4 * half < width) half *= 2;",
        ),
    ),
    *in_file(
        "csrc/cuda/sparsify.cu",
        CUDA,
        ("energies are of squares", "kSquares ? delta[t] * delta[t] : delta[t]", "delta[t]"),
    ),
    *in_file(
        "fastmerge/backends/cuda/importance.py",
        CUDA,
        ("one mask for all models", "kept = (*kept[:-1], 0)", "kept = (*kept[:-1], mask is not None)"),
        ("rows that memory is left for", "some = min(together, rows - first)", "some = 1"),
    ),
    *in_file(
        "fastmerge/methods/sce.py",
        METHODS,
        (
            "sce: of what is not 0",
            "last = int(int(torch.count_nonzero(spread[0])) * self.select_topk)",
            "last = int(spread[0].numel() * self.select_topk)",
        ),
        ("sce: little energy weighs all alike", "if total < SMALLEST_ENERGY:", "if total <= 0.0:"),
        ("sce: the least divisor", "if any(0 < weight < SMALLEST_SHARE for weight in weights):", "if False:"),
        (
            "sce: the least divisor where the share is less",
            "torch.where(share < least, least, share)",
            "torch.where(share == 0, least, share)",
        ),
        ("sce: the unweighted sum elects", 'election="total"', 'election="weighted"'),
        (
            "sce: energies of what is selected",
            "return ops.energy_sums(chunk.base, chunk.models, mask=mask,",
            "return ops.energy_sums(chunk.base, chunk.models, mask=None,",
        ),
    ),
    *in_file(
        "fastmerge/methods/ram.py",
        METHODS,
        ("ramplus: no more than alpha", "min(shared_changes / max(lone, 1), alpha)", "shared_changes / max(lone, 1)"),
        ("ramplus: the ratio to lone changes", "shared_changes / max(lone, 1)", "lone / max(shared_changes, 1)"),
    ),
    *in_file(
        "fastmerge/methods/arcee_fusion.py",
        METHODS,
        (
            "fusion: quartiles from the smallest",
            "numel - int(quartile * (numel - 1))",
            "1 + int(quartile * (numel - 1))",
        ),
        ("fusion: one and a half times the distance", "median + (high - low) * 1.5", "median + (high - low)"),
        (
            "fusion: the threshold itself is taken",
            "& 0x7FFFFFFF).to(torch.int64)\n",
            "& 0x7FFFFFFF).to(torch.int64) + 1\n",
        ),
    ),
]
