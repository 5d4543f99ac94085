// Checked views of the arrays that Python passes, over DLPack: torch tensors and numpy arrays, nothing is
// copied.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdarg>
#include <cstdint>
#include <optional>
#include <string>

#include "kernels.h"

namespace tenfold {

using Input = nanobind::ndarray<nanobind::ro, nanobind::device::cpu>;
using Output = nanobind::ndarray<nanobind::device::cpu>;

// Raises ValueError with a message made as by printf.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void refuse(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw nanobind::value_error(message);
}

inline void require(bool fulfilled, const char* message) {
  if (!fulfilled) refuse("%s", message);
}

template <class Array>
std::string shape_of(const Array& array) {
  std::string text = "[";
  for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

constexpr nanobind::dlpack::dtype kBf16 = {static_cast<uint8_t>(nanobind::dlpack::dtype_code::Bfloat), 16, 1};

template <class Array>
std::optional<DType> float_type(const Array& array) {
  if (array.dtype() == nanobind::dtype<float>()) return DType::f32;
  if (array.dtype() == kBf16) return DType::bf16;
  return std::nullopt;
}

// A matrix [rows, cols] of fp32 or bf16 whose elements of a row are neighbours.
template <class Array>
Rows matrix(const Array& array, const char* name) {
  const std::optional<DType> dtype = float_type(array);
  if (!dtype) refuse("%s must be float32 or bfloat16", name);
  if (array.ndim() != 2) refuse("%s must be a matrix, got shape %s", name, shape_of(array).c_str());
  if (array.shape(1) > 1 && array.stride(1) != 1) refuse("%s: elements of a row must be neighbours", name);
  return {const_cast<void*>(static_cast<const void*>(array.data())), *dtype,
          static_cast<int64_t>(array.shape(0)), static_cast<int64_t>(array.shape(1)), array.stride(0)};
}

// The data of a contiguous array of this dtype and shape.
template <class Array>
void* contiguous_of(const Array& array, nanobind::dlpack::dtype dtype, std::initializer_list<int64_t> shape,
                    const char* name, const char* type) {
  bool right = array.dtype() == dtype && array.ndim() == shape.size();
  std::string expected = "[";
  int64_t step = 1;
  for (size_t i = shape.size(); right && i-- > 0;) {
    const int64_t size = shape.begin()[i];
    right = static_cast<int64_t>(array.shape(i)) == size &&
            (size == 1 || array.size() == 0 || array.stride(i) == step);
    step *= size;
  }
  for (const int64_t size : shape) expected += (expected.size() > 1 ? ", " : "") + std::to_string(size);
  if (!right)
    refuse("%s must be contiguous %s %s], got shape %s", name, type, expected.c_str(),
           shape_of(array).c_str());
  return const_cast<void*>(static_cast<const void*>(array.data()));
}

template <class T, class Array>
T* contiguous(const Array& array, std::initializer_list<int64_t> shape, const char* name, const char* type) {
  return static_cast<T*>(contiguous_of(array, nanobind::dtype<T>(), shape, name, type));
}

template <class Array>
bf16* contiguous_bf16(const Array& array, std::initializer_list<int64_t> shape, const char* name) {
  return static_cast<bf16*>(contiguous_of(array, kBf16, shape, name, "bfloat16"));
}

}  // namespace tenfold
