"""Mutations of what `fastmerge verify` lets pass beside mergekit: each rule must find a merge that is wrong."""

from __future__ import annotations

from checks.mutation_list.mutation import in_file

_TESTS = "tests/compat/test_mergekit_verify.py::"
AGREEMENT = "fastmerge/integrations/mergekit/agreement.py"
VERIFY = "fastmerge/integrations/mergekit/verify.py"

MUTATIONS = [
    *in_file(
        AGREEMENT,
        (
            f"{_TESTS}test_only_elements_that_equal_the_threshold_are_open",
            f"{_TESTS}test_a_merge_in_float32_that_was_rounded_step_by_step_is_wrong_even_where_mergekit_writes_the_same",
            f"{_TESTS}test_what_another_release_does_otherwise_is_not_judged",
            f"{_TESTS}test_float16_that_overflows_in_mergekit_is_no_fault",
            f"{_TESTS}test_units_of_the_last_place",
        ),
        ("a cut between different magnitudes leaves nothing open", "falling[cut - 1] == falling[cut]", "True"),
        ("only what equals the threshold is open", "found |= magnitude == falling[cut]", "found |= magnitude >= 0"),
        (
            "what mergekit writes does not excuse what its function denies",
            "wrong = ~_equal(a, exact) &",
            "wrong = differ & ~_equal(a, exact) &",
        ),
        ("only another release is not judged", "    if case.otherwise:", "    if not case.otherwise:"),
        ("only float16 overflows", "if case.compute == torch.float16:", "if case.compute.itemsize == 2:"),
        ("denormal numbers have one unit", ".clamp(min=about.smallest_normal)", ".clamp(min=0)"),
    ),
    *in_file(
        AGREEMENT,
        (
            f"{_TESTS}test_one_element_that_is_off_by_two_units_is_found",
            f"{_TESTS}test_with_mergekits_numerics_one_unit_is_found",
        ),
        ("half a unit is allowed for the last rounding", "slack + 0.5 * unit_of(", "slack + 2.5 * unit_of("),
        ("a selection that is whole hangs on nothing", "0 < float(case.values[", "0 <= 0 * float(case.values["),
    ),
    *in_file(
        VERIFY,
        (
            f"{_TESTS}test_a_random_method_that_keeps_too_much_or_scales_wrongly_is_found",
            f"{_TESTS}test_what_is_kept_at_random_is_told_for_each_model",
        ),
        ("too much that is kept is wrong", "+ int(unlikely)", "+ 0 * int(unlikely)"),
        ("a wrong scale is wrong", "int(off.sum()) +", "0 * int(off.sum()) +"),
        ("what keeps everything is not drawn", "in enumerate(drops) if lost", "in enumerate(drops) if lost or True"),
    ),
    *in_file(
        VERIFY,
        (
            f"{_TESTS}test_large_tensors_are_compared_in_part_and_the_seed_says_which",
            f"{_TESTS}test_the_sample_has_each_kind_the_largest_and_the_smallest_and_is_reproducible",
        ),
        ("the seed says which part", 'random.Random(f"{self.seed} {job.name}")', 'random.Random(f"{job.name}")'),
        ("the seed says which tensors", "random.Random(seed).shuffle(shuffled)", "random.Random(0).shuffle(shuffled)"),
    ),
]
