#include "bindings/cuda/arguments.h"

namespace fastmerge {
namespace bindings {

void bind_pcb(py::module_& m) { (void)m; }

}  // namespace bindings
}  // namespace fastmerge
