// What one call of a layer launches: plain structs, read from the int64 numbers that
// adalora_kernels/kernels/encode.py writes. A recipe holds for every number of rows M of a bucket.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace adalora {

// The tensors of a call, in the order of encode.py; its workspace is divided into what follows.
enum Array : int64_t {
  of_x,
  of_weight,
  of_bias,
  of_base,
  of_A,
  of_E,
  of_B,
  of_mask,
  of_seed,
  of_h,
  of_grad_y,
  of_y,
  of_dx,
  of_dA,
  of_dE,
  of_dB,
  of_workspace
};

// The numbers of a call that are not sizes, as kernels take them: 4 bytes each.
struct Scalars {
  float scaling;
  int32_t drop_below;  // of the 2^16 values of an entry's random number
  float keep_scale;
};

constexpr int64_t most_parts = 16, most_parameters = 96, most_bytes = 4096;

// min(ceil(M / per) * times + plus, most): the only way in which a launch depends on M.
struct Count {
  int64_t per, times, plus, most;

  bool is_constant() const { return times == 0; }
  int64_t of(int64_t m) const {
    const int64_t blocks = is_constant() ? 0 : per == 1 ? m : (m + per - 1) / per;
    return std::min(blocks * times + plus, most);
  }
};

// A part of the workspace. It begins where the part `after` ends, or at 0.
struct Part {
  int64_t after;
  int64_t itemsize;
  std::vector<Count> shape;
};

// Where a parameter that is not the same at every call is written.
struct Patch {
  enum Kind : int64_t { address, number, scalar } kind;
  uint32_t offset;
  uint32_t bytes;
  int64_t index;  // of the array, or of the scalar
  Count count;
};

// A tensor map, which is encoded at every call, because its address moves.
struct Map {
  uint32_t offset;
  int64_t array;
  Count rows, columns;
  int64_t row_bytes;
  uint32_t block_rows, block_columns;
  int64_t type, element_bytes, swizzle, fill;
};

// Two dimensions of a tensor of the call.
struct Matrix {
  int64_t array;
  Count rows, columns;
  int64_t strides[2];
};

// A launch of a kernel: the bytes of all its parameters, with those of the first call in the
// patches and maps missing; or a product out += x w of torch's, which has no function.
struct Step {
  void* function = nullptr;
  uint32_t shared = 0, threads = 0;
  bool early = false;  // see Driver::launch
  Count grid[3] = {};
  std::vector<unsigned char> bytes;
  std::vector<uint32_t> offsets;  // of each parameter in the bytes
  std::vector<Patch> patches;
  std::vector<Map> maps;
  std::vector<Matrix> product;  // out, x, w
};

struct Recipe {
  std::vector<Part> parts;
  std::vector<Step> steps;  // none: the launcher does not serve such calls
};

// The parts' begins, and the size of the whole, for M rows.
inline int64_t place_parts(const std::vector<Part>& parts, int64_t m, int64_t* begins) {
  int64_t ends[most_parts], total = 0;
  for (size_t i = 0; i < parts.size(); i++) {
    int64_t bytes = parts[i].itemsize;
    for (const Count& size : parts[i].shape) bytes *= size.of(m);
    begins[i] = parts[i].after < 0 ? 0 : ends[parts[i].after];
    ends[i] = (begins[i] + bytes + 255) / 256 * 256;
    total = std::max(total, ends[i]);
  }
  return total;
}

// Reads a recipe; what does not make one is an error in encode.py.
class Reader {
 public:
  Reader(const int64_t* numbers, int64_t length) : next_(numbers), end_(numbers + length) {}

  Recipe recipe() {
    Recipe recipe;
    const int64_t parts = number(0, most_parts);
    for (int64_t i = 0; i < parts; i++) {
      Part part{number(-1, i - 1), number(1, 16), {}};
      const int64_t dims = number(0, 8);
      for (int64_t d = 0; d < dims; d++) part.shape.push_back(count());
      recipe.parts.push_back(part);
    }
    arrays_ = of_workspace + parts;
    const int64_t steps = number(0, 64);
    for (int64_t i = 0; i < steps; i++) recipe.steps.push_back(number(0, 1) ? product() : launch());
    require(next_ == end_);
    return recipe;
  }

 private:
  static void require(bool holds) {
    if (!holds) throw std::runtime_error("adalora::plan_launches returned what is not a recipe");
  }
  int64_t number(int64_t least = INT64_MIN, int64_t most = INT64_MAX) {
    require(next_ < end_ && *next_ >= least && *next_ <= most);
    return *next_++;
  }
  int64_t array() { return number(0, arrays_ - 1); }
  Count count() {
    const int64_t per = number(1), times = number(0), plus = number();
    return {per, times, plus, number()};
  }
  Matrix matrix() {
    const int64_t of = number(0, of_workspace - 1);
    const Count rows = count(), columns = count();
    const int64_t stride = number();
    return {of, rows, columns, {stride, number()}};
  }
  Step product() {
    Step step;
    for (int i = 0; i < 3; i++) step.product.push_back(matrix());
    return step;
  }
  Step launch() {
    Step step;
    step.function = reinterpret_cast<void*>(number());
    step.shared = static_cast<uint32_t>(number(0, INT32_MAX));
    step.threads = static_cast<uint32_t>(number(1, 1024));
    step.early = number(0, 1);
    for (Count& size : step.grid) size = count();
    const int64_t parameters = number(0, most_parameters);
    for (int64_t i = 0; i < parameters; i++) parameter(step);
    return step;
  }

  enum Kind : int64_t { constant_, address_, scalar_, map_ };

  void parameter(Step& step) {
    switch (number(constant_, map_)) {
      case constant_: {
        const int64_t bytes = number(1, 8);
        const Count value = count();
        const uint32_t offset = room(step, bytes, bytes);
        if (value.is_constant()) {
          std::memcpy(&step.bytes[offset], &value.plus, bytes);
        } else {
          step.patches.push_back({Patch::number, offset, static_cast<uint32_t>(bytes), 0, value});
        }
        break;
      }
      case address_:
        step.patches.push_back({Patch::address, room(step, 8, 8), 8, array(), {}});
        break;
      case scalar_:
        step.patches.push_back({Patch::scalar, room(step, 4, 4), 4, number(0, 2), {}});
        break;
      default: {
        Map map{};
        map.offset = room(step, 128, 64);
        map.array = array();
        map.rows = count();
        map.columns = count();
        map.row_bytes = number(0);
        map.block_rows = static_cast<uint32_t>(number(1, 256));
        map.block_columns = static_cast<uint32_t>(number(1, 256));
        map.type = number(0, INT32_MAX);
        map.element_bytes = number(1, 16);
        map.swizzle = number(0, INT32_MAX);
        map.fill = number(0, 1);
        step.maps.push_back(map);
      }
    }
  }
  static uint32_t room(Step& step, int64_t bytes, int64_t alignment) {
    const int64_t offset =
        (static_cast<int64_t>(step.bytes.size()) + alignment - 1) / alignment * alignment;
    require(offset + bytes <= most_bytes);
    step.bytes.resize(offset + bytes);
    step.offsets.push_back(static_cast<uint32_t>(offset));
    return static_cast<uint32_t>(offset);
  }

  const int64_t* next_;
  const int64_t* end_;
  int64_t arrays_ = of_workspace;
};

}  // namespace adalora
