#include "cuda/api.h"
#include "cuda/tile.h"

FM_NAMESPACE_BEGIN
namespace cuda {}  // namespace cuda
FM_NAMESPACE_END
