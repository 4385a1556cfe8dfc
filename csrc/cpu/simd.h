// Vectors, conversions and loops over chunks, for the ops on a CPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../ops.h"

// One binary for every x86-64 processor: the loader picks the widest of these (AVX2, AVX-512).
// ADALORA_CLONES compiles one function for all of them. Where the code itself depends on the
// registers, ADALORA_VERSIONS(DEFINE) makes a function DEFINE(attribute, Registers) for each.
#if defined(ADALORA_CLONES)
// Whoever compiles has decided: a sanitizer does with one.
#define ADALORA_VERSIONS(DEFINE) DEFINE(, Narrow<16>)
#elif defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define ADALORA_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define ADALORA_VERSIONS(DEFINE)                                    \
  DEFINE(__attribute__((target("default"))), Narrow<16>)            \
  DEFINE(__attribute__((target("arch=x86-64-v3"))), Narrow<32>)     \
  DEFINE(__attribute__((target("arch=x86-64-v4"))), Wide)
#else
#define ADALORA_CLONES
#define ADALORA_VERSIONS(DEFINE) DEFINE(, Narrow<16>)
#endif
// Into every clone of its caller, so that it is compiled for that processor, too.
#define ADALORA_INLINE inline __attribute__((always_inline))

namespace adalora::cpu {

constexpr int64_t kLanes = 16;  // of every vector a divisor: what rows and columns are padded to

// kCount entries; may lie at the address of any entry. No wider than a register: a compiler keeps
// what is wider in memory.
template <class T, int kCount>
struct LanesOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int kCount>
using Lanes = typename LanesOf<T, kCount>::type;

template <int kCount, class T>
ADALORA_INLINE Lanes<T, kCount>& lanes_at(T* p) {
  return *reinterpret_cast<Lanes<T, kCount>*>(p);
}
template <int kCount, class T>
ADALORA_INLINE const Lanes<T, kCount>& lanes_at(const T* p) {
  return *reinterpret_cast<const Lanes<T, kCount>*>(p);
}

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

// `count` entries of `type`, `stride` apart, as T one after the other.
template <class T>
ADALORA_INLINE void load(T* to, const void* from, Type type, int64_t start, int64_t stride,
                         int64_t count) {
  with_type(type, [&](auto zero) __attribute__((always_inline)) {
    const auto* p = static_cast<const decltype(zero)*>(from) + start;
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(p[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(p[i * stride]);
    }
  });
}

// The reverse: written, or added to what is there.
template <class T>
ADALORA_INLINE void store(const T* from, void* to, Type type, int64_t start, int64_t stride,
                          int64_t count, bool add = false) {
  with_type(type, [&](auto zero) __attribute__((always_inline)) {
    using S = decltype(zero);
    S* p = static_cast<S*>(to) + start;
    if (stride == 1 && add) {
      for (int64_t i = 0; i < count; ++i) p[i] = S(static_cast<T>(p[i]) + from[i]);
    } else if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) p[i] = S(from[i]);
    } else {
      for (int64_t i = 0; i < count; ++i)
        p[i * stride] = S(add ? static_cast<T>(p[i * stride]) + from[i] : from[i]);
    }
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
