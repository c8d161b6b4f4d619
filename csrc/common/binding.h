// What the bindings share. Tensors come as addresses (tensor.data_ptr()) and sizes: no torch
// header.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace moca {

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("moca_fast: " + message);
}

using Binder = void (*)(pybind11::module_&);
std::vector<Binder>& binders();

struct RegisterBinder {
  explicit RegisterBinder(Binder binder) { binders().push_back(binder); }
};

// MOCA_BINDING(op, module) { module.def(...); } at the end of an op's binding.cpp registers it.
#define MOCA_BINDING(op, module)                                 \
  static void bind_##op(pybind11::module_& module);              \
  static const ::moca::RegisterBinder register_##op(&bind_##op); \
  static void bind_##op(pybind11::module_& module)

}  // namespace moca
