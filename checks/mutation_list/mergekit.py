"""Mutations of what decides, inside mergekit, whether a tensor is merged by fastmerge's kernels or left to mergekit."""

from __future__ import annotations

from checks.mutation_list.mutation import in_file

_INSIDE = "tests/compat/test_mergekit_inside.py::"
LEFT = (f"{_INSIDE}test_what_the_kernels_cannot_take_is_left_to_mergekit",)
GRADIENTS = (
    f"{_INSIDE}test_gradients_are_mergekits_own",
    f"{_INSIDE}test_forward_gradients_are_mergekits_own",
    f"{_INSIDE}test_parameters_of_modules_are_merged_where_no_gradients_are_recorded",
)
SEEDS = (
    f"{_INSIDE}test_a_random_method_drops_what_fastmerge_drops_for_the_tensors_name",
    f"{_INSIDE}test_without_a_seed_or_a_name_torchs_generator_says_what_is_dropped",
)
GROUP = "fastmerge/integrations/mergekit/group.py"
METHODS = "fastmerge/integrations/mergekit/methods.py"
PATCHES = "fastmerge/integrations/mergekit/patches.py"

MUTATIONS = [
    *in_file(
        GROUP,
        LEFT,
        ("NaN is left to mergekit", "return bool(counts.any())", "return bool(counts[:, 1].any())"),
        ("infinity is left to mergekit", "return bool(counts.any())", "return bool(counts[:, 0].any())"),
        ("the base is looked at, too", "has_nonfinite(everyone,", "has_nonfinite(models,"),
        ("float64 is left to mergekit", "if tensor.dtype not in DTYPES:", "if not tensor.is_floating_point():"),
        (
            "tensors of a kind of their own are left",
            "type(tensor) not in (torch.Tensor, torch.nn.Parameter)",
            "not isinstance(tensor, torch.Tensor)",
        ),
        ("tensors without elements are left", "if first.numel() == 0:", "if first.numel() < 0:"),
    ),
    *in_file(
        GROUP,
        GRADIENTS,
        ("gradients are mergekit's", "torch.is_grad_enabled() and any(", "False and any("),
        ("gradients that nobody records do not matter", "torch.is_grad_enabled() and any(", "any("),
        ("forward gradients are mergekit's", ".tangent is not None for tensor", ".tangent is False for tensor"),
    ),
    *in_file(
        GROUP,
        SEEDS,
        ("a seed that is given holds for names", "settings.seed is None or not name", "True"),
        ("without a seed, torch's generator draws", "settings.seed is None or not name", "not name"),
        ("a tensor without a name has no seed", "settings.seed is None or not name", "settings.seed is None"),
    ),
    *in_file(
        GROUP,
        (f"{_INSIDE}test_densities_above_one_keep_everything_as_in_mergekit",),
        ("densities above 1 keep everything", "return min(float(value), 1.0)", "return float(value)"),
    ),
    *in_file(
        GROUP,
        (f"{_INSIDE}test_where_no_kernels_work_mergekit_goes_on",),
        ("the reference is no kernel", 'if found == "reference":', 'if found == "nothing":'),
    ),
    *in_file(
        METHODS,
        (
            f"{_INSIDE}test_slerp_and_sce_are_mergekits_but_for_its_rounding",
            f"{_INSIDE}test_sce_in_float16_is_mergekits_unless_float32_is_asked_for",
        ),
        (
            "slerp and sce have numbers of their own",
            'return "fp32" if isinstance(method, always) else asked',
            "return asked",
        ),
        ("sce in float16 is left to mergekit", 'return asked == "mergekit" and dtype', "return False and dtype"),
        ("sce in float16 is merged in float32", 'return asked == "mergekit" and dtype', "return dtype"),
        ("sce in bfloat16 is merged", "dtype == torch.float16 and", "dtype != torch.float32 and"),
    ),
    *in_file(
        GROUP,
        (f"{_INSIDE}test_a_batch_of_slerps_takes_a_t_for_each_output_and_the_base_where_it_is",),
        ("slerp takes two", "        method.check_count(len(models))\n", ""),
    ),
    *in_file(
        PATCHES,
        (f"{_INSIDE}test_what_somebody_else_put_over_ours_stays_and_ours_beneath_gives_way",),
        ("what others put over ours stays", "if self._there() is not self.ours:", "if self.ours is None:"),
    ),
]
