// The op of model/products.py in C++, for programs that run without Python.
#include "products.h"

namespace {

const Registered panels("linear_by_panels", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
                        TORCH_FN(linear_by_panels));

}  // namespace
