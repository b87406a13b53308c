// How a function in C++ becomes the operator torchchat::NAME on the CPU. Where Python has declared it already
// (model/ops.py), this takes the place of what Python would do; in a program without Python it is all there is.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

namespace {

class Registered {
  public:
    // schema: from the opening parenthesis on, as `torch.library.infer_schema` gives it.
    template <class Function>
    Registered(const char* name, const char* schema, Function function)
        : library_(torch::Library::FRAGMENT, "torchchat", std::nullopt, __FILE__, __LINE__) {
        const std::string full = std::string("torchchat::") + name;
        const auto known = c10::Dispatcher::singleton().findSchema({full, ""});
        if (!known) library_.def((full + schema).c_str());
        // One package's library may be here already.
        if (!known || !known->hasKernelForDispatchKey(c10::DispatchKey::CPU))
            library_.impl(name, torch::dispatch(c10::DispatchKey::CPU, function));
    }

  private:
    torch::Library library_;
};

}  // namespace
