// What the bindings share. Tensors come as addresses (tensor.data_ptr()) and sizes: no torch
// header.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>
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

// A field of a kernel's parameters, and its name in Python.
template <typename Params, typename Value>
struct Field {
  const char* name;
  Value Params::* member;
};

template <typename Params, typename Value>
Field<Params, Value> field(const char* name, Value Params::* member) {
  return {name, member};
}

// Binds a parameter struct whose constructor takes every field by keyword, pointers as addresses
// (0 for what is absent), and then runs check(params).
template <typename Params, typename Check, typename... Values>
void bind_params(pybind11::module_& module, const char* name, Check check,
                 Field<Params, Values>... fields) {
  const auto make = [=](const pybind11::kwargs& given) {
    Params params{};
    const auto set = [&](const auto& field) {
      using Value = std::decay_t<decltype(params.*field.member)>;
      using Given = std::conditional_t<std::is_pointer_v<Value>, uintptr_t, Value>;
      require(given.contains(field.name), std::string(name) + ": missing " + field.name);
      const auto value = given[field.name].template cast<Given>();
      if constexpr (std::is_pointer_v<Value>)
        params.*field.member = reinterpret_cast<Value>(value);
      else
        params.*field.member = value;
    };
    (set(fields), ...);
    require(given.size() == sizeof...(fields), std::string(name) + ": unknown field");
    check(params);
    return params;
  };
  pybind11::class_<Params>(module, name).def(pybind11::init(make));
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
