// Implements adalora::launch_forward and launch_backward: one call per layer and direction, which
// launches the kernels that Triton has compiled. What is launched is a recipe (recipe.h), which is
// looked up by all that it depends on; where there is none yet, the Python op
// adalora::plan_launches makes it. A call that is not served returns nothing, and launches nothing:
// the caller then takes the long way, by Triton's own launch, which finds the words for what is
// wrong.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <memory>
#include <optional>

#include "call.h"
#include "driver.h"
#include "plans.h"
#include "recipe.h"
#include "tensors.h"

// Those of libtorch_cuda are weak, so that a torch without CUDA can load this library, too.
extern "C" {
AOTITorchError aoti_torch_cuda_randint_low_out(AtenTensorHandle out, int64_t low, int64_t high,
                                               const int64_t* sizes, int64_t dim)
    __attribute__((weak));
AOTITorchError aoti_torch_cpu_randint_low_out(AtenTensorHandle out, int64_t low, int64_t high,
                                              const int64_t* sizes, int64_t dim);
AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle bias,
                                         AtenTensorHandle x, AtenTensorHandle w, double beta,
                                         double alpha) __attribute__((weak));
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle bias,
                                        AtenTensorHandle x, AtenTensorHandle w, double beta,
                                        double alpha);
}

namespace adalora {
namespace {

// Leaves the results on the stack; all are None where the call was not served.
void put_results(StableIValue* stack, Call& call, std::initializer_list<Array> results,
                 bool served) {
  for (const Array array : results) {
    *stack++ = optional_value(served ? call.owned[array].release() : nullptr);
  }
}

bool is_on_gpu(const Call& call) { return call[of_x].device_type == codes().cuda; }

// The driver that serves tensors on the device of this call, which it gets to know; or null.
const Driver* find_driver(Call& call) {
  const Strided& x = call[of_x];
  if (is_on_gpu(call)) {
    if (aoti_torch_get_current_cuda_stream == nullptr) return nullptr;
    call.device = x.device_index;
    return Driver::get();
  }
  const Driver* driver = x.device_type == codes().cpu ? Driver::get() : nullptr;
  if (driver == nullptr || driver->fake_device == nullptr) return nullptr;
  call.device = *driver->fake_device;
  return driver;
}

Key key_of(const Call& call) {
  int64_t flags = call.is_backward | call.need_dx << 1 | call.has_dropout << 2;
  for (const Array array : {of_x, of_base, of_grad_y}) {
    if (call[array].dtype == codes().float32) flags |= call.tf32 << 3;
  }
  // Presence and alignment of each tensor that it gets.
  for (int64_t i = of_x; i <= of_grad_y; i++) {
    const bool is_there = call.tensors[i].handle != nullptr;
    const bool is_aligned = call[static_cast<Array>(i)].is_aligned();
    flags |= (is_there + 2LL * is_aligned) << (4 + 2 * i);
  }
  int64_t dtypes = 0;
  for (const Array array : {of_x, of_base, of_A, of_E, of_grad_y}) {
    dtypes = dtypes << 8 | (call[array].dtype & 255);
  }
  return {{flags, dtypes, call.device, rows_bucket(call.rows), call.in, call.out, call.ranks,
           call.x_strides[0], call.x_strides[1], call.weight_strides[0], call.weight_strides[1],
           call.is_backward ? call.grad_strides[0] : call.base_strides[0],
           call.is_backward ? call.grad_strides[1] : call.base_strides[1]}};
}

// Lets Python make a recipe; null where it can't now, and may another time. It catches what is an
// error, so that only an interruption gets here.
std::shared_ptr<const Recipe> make_recipe(const Driver& driver, const Call& call, const Key& key) {
  Plans::get().misses++;
  const Driver::MayLoad may_load(driver);
  StableIValue stack[12];
  size_t next = 0;
  for (const Array array :
       {of_x, of_weight, of_bias, of_base, of_A, of_E, of_B, of_mask, of_seed, of_h, of_grad_y}) {
    const bool always = array == of_x || array == of_A || array == of_E || array == of_B;
    stack[next++] = always ? argument(call[array].handle) : optional_argument(call[array].handle);
  }
  stack[next] = stable::from(call.need_dx);
  STD_TORCH_CHECK(adalora::call("adalora::plan_launches", "", stack),
                  "the launches of a layer were being planned, and this was interrupted");
  const Owned numbers(stable::to<AtenTensorHandle>(stack[0]));
  Strided encoded;
  if (!read(numbers.get(), encoded) || encoded.dtype != codes().int64 || encoded.dim != 1 ||
      encoded.device_type != codes().cpu || !encoded.is_contiguous() || encoded.sizes[0] == 0) {
    return nullptr;
  }
  Reader reader(static_cast<const int64_t*>(encoded.data), encoded.sizes[0]);
  return Plans::get().add(key, reader.recipe());
}

bool make_workspace(Call& call, const Recipe& recipe) {
  if (recipe.parts.empty()) return true;
  int64_t begins[most_parts];
  const int64_t bytes = place_parts(recipe.parts, call.rows, begins);
  if (!allocate(call, 1, &bytes, codes().uint8, call.workspace)) return false;
  void* memory = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(call.workspace.get(), &memory));
  for (size_t i = 0; i < recipe.parts.size(); i++) {
    call.data[of_workspace + i] = static_cast<char*>(memory) + begins[i];
  }
  return true;
}

// Draws what torch.randint(2**63 - 1, (1,)) would, from the same generator.
bool draw_seed(const Call& call) {
  const auto draw =
      is_on_gpu(call) ? aoti_torch_cuda_randint_low_out : aoti_torch_cpu_randint_low_out;
  const int64_t one = 1;
  return draw != nullptr && draw(call[of_seed].handle, 0, INT64_MAX, &one, 1) == 0;
}

void launch(const Driver& driver, const Step& step, const Call& call, void* stream) {
  alignas(64) unsigned char bytes[most_bytes];
  void* parameters[most_parameters];
  std::memcpy(bytes, step.bytes.data(), step.bytes.size());
  for (const Patch& patch : step.patches) {
    if (patch.kind == Patch::address) {
      std::memcpy(bytes + patch.offset, &call.data[patch.index], sizeof(void*));
    } else if (patch.kind == Patch::number) {
      const int64_t value = patch.count.of(call.rows);
      std::memcpy(bytes + patch.offset, &value, patch.bytes);
    } else {
      std::memcpy(bytes + patch.offset,
                  reinterpret_cast<const char*>(&call.scalars) + 4 * patch.index, 4);
    }
  }
  for (const Map& map : step.maps) {
    const uint64_t sizes[2] = {static_cast<uint64_t>(map.columns.of(call.rows)),
                               static_cast<uint64_t>(map.rows.of(call.rows))};
    const uint32_t block[2] = {map.block_columns, map.block_rows};
    driver.encode(bytes + map.offset, static_cast<int>(map.type), map.element_bytes,
                  call.data[map.array], sizes, map.row_bytes, block, static_cast<int>(map.swizzle),
                  static_cast<int>(map.fill));
  }
  for (size_t i = 0; i < step.offsets.size(); i++) parameters[i] = bytes + step.offsets[i];
  uint32_t grid[3];
  for (int i = 0; i < 3; i++) grid[i] = static_cast<uint32_t>(step.grid[i].of(call.rows));
  driver.launch(step.function, grid, step.threads, step.shared, step.early, stream, parameters);
}

Owned view(const Call& call, const Matrix& matrix) {
  const int64_t sizes[2] = {matrix.rows.of(call.rows), matrix.columns.of(call.rows)};
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(call.tensors[matrix.array].handle, 2, sizes,
                                                        matrix.strides, 0, &made));
  return Owned(made);
}

// out += x w, by torch, which calls cuBLAS.
bool multiply(const Call& call, const Step& step) {
  const Owned out = view(call, step.product[0]), x = view(call, step.product[1]),
              w = view(call, step.product[2]);
  const auto addmm = is_on_gpu(call) ? aoti_torch_cuda_addmm_out : aoti_torch_cpu_addmm_out;
  // Added to itself it has to be the same tensor, or else torch copies it first.
  return addmm != nullptr && addmm(out.get(), out.get(), x.get(), w.get(), 1.0, 1.0) == 0;
}

// Carries out the recipe; false where torch raises.
bool carry_out(const Driver& driver, const Recipe& recipe, const Call& call) {
  void* stream = nullptr;
  if (is_on_gpu(call)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(call.device, &stream));
  }
  driver.ensure_context(call.device);
  for (const Step& step : recipe.steps) {
    if (step.product.empty()) {
      launch(driver, step, call, stream);
    } else if (!multiply(call, step)) {
      return false;
    }
  }
  return true;
}

// Whether the call was served.
bool serve(Call& call) {
  if (!fits(call)) return false;
  const Driver* driver = find_driver(call);
  if (driver == nullptr) return false;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (is_on_gpu(call)) guard.emplace(call.device);
  const bool draws = call.has_dropout && !call.has(of_seed);
  const int64_t one = 1;
  if (draws) {
    // Backwards get that of their forward.
    Owned seed;
    if (call.is_backward || !allocate(call, 1, &one, codes().int64, seed) ||
        !call.take(of_seed, std::move(seed))) {
      return false;
    }
  }
  if (!make_readable(call)) return false;
  const Key key = key_of(call);
  std::shared_ptr<const Recipe> recipe = Plans::get().find(key);
  if (recipe == nullptr) recipe = make_recipe(*driver, call, key);
  if (recipe == nullptr || recipe->steps.empty()) return false;
  if (!(call.is_backward ? make_backward(call) : make_forward(call))) return false;
  if (!make_workspace(call, *recipe)) return false;
  return (!draws || draw_seed(call)) && carry_out(*driver, *recipe, call);
}

void launch_forward(StableIValue* stack, uint64_t, uint64_t) {
  Call call;
  Stack next(stack);
  bool readable = call.take(of_x, next.tensor());
  for (const Array array : {of_weight, of_bias, of_base}) {
    readable &= call.take(array, next.optional());
  }
  for (const Array array : {of_A, of_E, of_B}) readable &= call.take(array, next.tensor());
  for (const Array array : {of_mask, of_seed}) readable &= call.take(array, next.optional());
  const double scaling = next.number(), dropout_p = next.number();
  call.tf32 = next.flag();
  const bool draws = !call.has(of_seed);
  const bool served = readable && call.has(of_weight) != call.has(of_base) &&
                      !(call.has(of_base) && call.has(of_bias)) &&
                      set_scalars(call, scaling, dropout_p) && serve(call);
  // What an op returns must not be what it got.
  if (!draws) call.owned[of_seed] = Owned();
  put_results(stack, call, {of_y, of_h, of_seed}, served);
}

void launch_backward(StableIValue* stack, uint64_t, uint64_t) {
  Call call;
  call.is_backward = true;
  Stack next(stack);
  bool readable = true;
  for (const Array array : {of_grad_y, of_x}) readable &= call.take(array, next.tensor());
  readable &= call.take(of_weight, next.optional());
  for (const Array array : {of_A, of_E, of_B}) readable &= call.take(array, next.tensor());
  for (const Array array : {of_mask, of_seed}) readable &= call.take(array, next.optional());
  readable &= call.take(of_h, next.tensor());
  const double scaling = next.number(), dropout_p = next.number();
  call.need_dx = next.flag();
  call.tf32 = next.flag();
  const bool served = readable && set_scalars(call, scaling, dropout_p) && serve(call);
  put_results(stack, call, {of_dx, of_dA, of_dE, of_dB}, served);
}

}  // namespace
}  // namespace adalora

STABLE_TORCH_LIBRARY_FRAGMENT(adalora, m) {
  m.def(
      "launch_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor A, Tensor E, "
      "Tensor B, Tensor? mask, Tensor? seed, float scaling, float dropout_p, bool tf32)"
      " -> (Tensor? y, Tensor? h, Tensor? seed)");
  m.def(
      "launch_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor A, Tensor E, Tensor B, "
      "Tensor? mask, Tensor? seed, Tensor h, float scaling, float dropout_p, bool need_dx, "
      "bool tf32) -> (Tensor? dx, Tensor? dA, Tensor? dE, Tensor? dB)");
}

STABLE_TORCH_LIBRARY_IMPL(adalora, CompositeExplicitAutograd, m) {
  m.impl("launch_forward", &adalora::launch_forward);
  m.impl("launch_backward", &adalora::launch_backward);
}

// Forgets every recipe, as the tables have changed that they were made from.
extern "C" __attribute__((visibility("default"))) void adalora_forget_plans() {
  adalora::Plans::get().forget();
}
// How often there was none, for tests and benches.
extern "C" __attribute__((visibility("default"))) int64_t adalora_plan_misses() {
  return adalora::Plans::get().misses;
}
