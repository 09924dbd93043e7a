"""Light experts on GPUs: plain torch, which is the definition, too, and gives the same bits on every device.

Both backends for GPUs have these functions from here. Of the order of a row's elements torch needs only the first few.
"""

from __future__ import annotations

from ..reference.expert import expert_apply_, expert_extract, expert_revert_

__all__ = ["expert_apply_", "expert_extract", "expert_revert_"]
