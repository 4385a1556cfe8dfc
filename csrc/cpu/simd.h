// Conversions and loops over chunks, compiled for the vectors of every processor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../ops.h"

// One binary for every x86-64 processor: ADALORA_CLONES compiles a function for each width of
// vectors, and the loader picks the widest that the processor has (AVX2, AVX-512).
#if defined(ADALORA_CLONES)
// Whoever compiles has decided: a sanitizer does with one.
#elif defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define ADALORA_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define ADALORA_CLONES
#endif
// Into every clone of its caller, so that it is compiled for that processor, too.
#define ADALORA_INLINE inline __attribute__((always_inline))

namespace adalora::cpu {

constexpr int64_t kLanes = 16;  // a multiple of the entries of every vector

template <class T>
constexpr Type type_of();
template <>
constexpr Type type_of<float>() {
  return Type::float32;
}
template <>
constexpr Type type_of<double>() {
  return Type::float64;
}

// Calls f with a value of the C++ type of `type`.
template <class F>
ADALORA_INLINE void with_type(Type type, const F& f) {
  switch (type) {
    case Type::float32:
      return f(float{});
    case Type::bfloat16:
      return f(c10::BFloat16{});
    case Type::float16:
      return f(c10::Half{});
    case Type::float64:
      return f(double{});
  }
}

// `count` entries of `type` as T.
template <class T>
ADALORA_INLINE void load(T* to, const void* from, Type type, int64_t start, int64_t count) {
  with_type(type, [&](auto zero) __attribute__((always_inline)) {
    const auto* p = static_cast<const decltype(zero)*>(from) + start;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(p[i]);
  });
}

// The reverse.
template <class T>
ADALORA_INLINE void store(const T* from, void* to, Type type, int64_t start, int64_t count) {
  with_type(type, [&](auto zero) __attribute__((always_inline)) {
    auto* p = static_cast<decltype(zero)*>(to) + start;
    for (int64_t i = 0; i < count; ++i) p[i] = decltype(zero)(from[i]);
  });
}

// Room for `count` entries that this thread reuses in its next call; not initialised. It begins
// with a cache line, so that vectors do not lie across two.
template <class T>
T* scratch(int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  thread_local std::vector<T> memory;
  if (static_cast<int64_t>(memory.size()) < count + kLine) memory.resize(count + kLine);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (64 - address % 64) % 64 / sizeof(T);
}

// f(i) for every i < count, in parallel if there are at least 2^15 of the `entries` per thread.
template <class F>
void for_each(int64_t count, int64_t entries, const F& f) {
  const int64_t grain = std::max<int64_t>(1, count * (1 << 15) / std::max<int64_t>(1, entries));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace adalora::cpu
