// The recipes that were made so far, each under all that it depends on.
#pragma once

#include <pthread.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "recipe.h"

namespace adalora {

// M rounded up to one of at most four steps per octave, as plans.rows_bucket does.
inline int64_t rows_bucket(int64_t m) {
  const int bits = m <= 1 ? 0 : 64 - __builtin_clzll(static_cast<unsigned long long>(m - 1));
  const int64_t step = int64_t{1} << std::max(0, bits - 3);
  return (m + step - 1) / step * step;
}

struct Key {
  std::array<int64_t, 13> words{};
  bool operator==(const Key& other) const { return words == other.words; }
};

struct HashOfKey {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const int64_t word : key.words) {
      hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

class Plans {
 public:
  // A program whose strides are new at every call is not to fill the memory.
  static constexpr size_t most_recipes = 1 << 14;

  static Plans& get() {
    static Plans plans;
    return plans;
  }

  // Null if there is none yet.
  std::shared_ptr<const Recipe> find(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto found = recipes_.find(key);
    return found == recipes_.end() ? nullptr : found->second;
  }
  // Where two threads make the same one at once, the first stays.
  std::shared_ptr<const Recipe> add(const Key& key, Recipe recipe) {
    auto made = std::make_shared<const Recipe>(std::move(recipe));
    const std::lock_guard lock(mutex_);
    if (recipes_.size() >= most_recipes) recipes_.clear();
    return recipes_.try_emplace(key, std::move(made)).first->second;
  }
  void forget() {
    const std::lock_guard lock(mutex_);
    recipes_.clear();
  }

  std::atomic<int64_t> misses = 0;

 private:
  // A child that is forked while another thread holds the lock would wait for it for ever.
  Plans() {
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); },
                   [] { get().mutex_.unlock(); });
  }

  std::mutex mutex_;
  std::unordered_map<Key, std::shared_ptr<const Recipe>, HashOfKey> recipes_;
};

}  // namespace adalora
