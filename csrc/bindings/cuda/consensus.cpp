#include "bindings/cuda/arguments.h"

namespace fastmerge {
namespace bindings {

void bind_consensus(py::module_& m) { (void)m; }

}  // namespace bindings
}  // namespace fastmerge
