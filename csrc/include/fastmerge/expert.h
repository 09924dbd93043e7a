// What an expert does to one value; see fastmerge/reference/expert.py.
#pragma once

#include "fastmerge/keys.h"

FM_NAMESPACE_BEGIN

// Whether an expert takes the place of what the model changed there, instead of coming on top of it.
FM_INLINE bool expert_replaces(float value) { return value != 0.0f; }

// Two float32 operations; the sum over all experts is rounded to the model's dtype once.
FM_INLINE float expert_add(float total, float value, float scale) { return total + value * scale; }

FM_NAMESPACE_END
