// A libcuda.so.1 that computes nothing, for fake_gpu.py: what runs on the host above the driver can
// be timed and looked at without a GPU. It is as strict as the driver where a launcher can go
// wrong: launches need a current context, and more than 48 KiB of shared memory a permission.
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };
enum { CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, RELAXED = 2 };
enum { DEVICES = 8, MOST_PARAMETERS = 128, FREE_SHARED_MEMORY = 48 << 10 };

// A function handle points to one of these. What it takes is declared when Triton loads it.
struct Function {
  char name[256];
  unsigned shared_memory, parameters, sizes[MOST_PARAMETERS];
};

// One launch, as fake_gpu.py reads it; the bytes of its parameters lie one behind the other.
struct Launch {
  struct Function* function;
  unsigned grid[3], block[3], shared_memory, attributes, early;
  void* stream;
  unsigned char* bytes;
};

// The device that tensors on the CPU count as being on. That it is there tells the package's own
// launcher that it launches for the fake GPU.
int adalora_fake_device = 0;
// Counted always; launches are written down only while adalora_fake_record(1) holds.
long adalora_fake_launches = 0, adalora_fake_errors = 0, adalora_fake_loads = 0;
// Set to 1 while a graph is being captured, in the mode that torch takes, which is global. A thread
// that loads code then makes it -1, for the capture has failed.
int adalora_fake_capture = 0;

static int recording = 0;
static size_t recorded = 0, room = 0;
static struct Launch* records = NULL;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char contexts[DEVICES];
static _Thread_local void* current = NULL;
static _Thread_local int capture_mode = 0;

static int failed(int error) {
  __atomic_fetch_add(&adalora_fake_errors, 1, __ATOMIC_RELAXED);
  return error;
}

void adalora_fake_declare(struct Function* f, unsigned parameters, const unsigned* sizes) {
  f->parameters = parameters;
  memcpy(f->sizes, sizes, parameters * sizeof *sizes);
}

// Begin with an empty list of launches, or end and keep what there is.
void adalora_fake_record(int on) {
  pthread_mutex_lock(&lock);
  for (recording = on; on && recorded > 0;) free(records[--recorded].bytes);
  pthread_mutex_unlock(&lock);
}

size_t adalora_fake_recorded(struct Launch** launches) {
  *launches = records;
  return recorded;
}

static int launch(const struct Launch* what, void** parameters) {
  if (!current) return failed(INVALID_CONTEXT);
  if (adalora_fake_capture < 0) return failed(CAPTURE_INVALIDATED);
  struct Function* f = what->function;
  if (what->shared_memory > FREE_SHARED_MEMORY && what->shared_memory > f->shared_memory)
    return failed(INVALID_VALUE);
  __atomic_fetch_add(&adalora_fake_launches, 1, __ATOMIC_RELAXED);
  if (!__atomic_load_n(&recording, __ATOMIC_RELAXED)) return 0;
  if (!f->parameters) return failed(INVALID_HANDLE);  // Nobody said what it takes.
  size_t size = 0;
  for (unsigned i = 0; i < f->parameters; i++) size += f->sizes[i];
  struct Launch copy = *what;
  unsigned char* end = copy.bytes = malloc(size);
  for (unsigned i = 0; i < f->parameters; end += f->sizes[i++])
    memcpy(end, parameters[i], f->sizes[i]);
  pthread_mutex_lock(&lock);
  if (recorded == room) records = realloc(records, (room = 2 * room + 64) * sizeof *records);
  records[recorded++] = copy;
  pthread_mutex_unlock(&lock);
  return 0;
}

// A CUlaunchAttribute, and a CUlaunchConfig.
struct Attribute {
  int id;
  union {
    int number;
    char bytes[64];
    long aligned;
  } value;
};
struct Config {
  unsigned grid[3], block[3], shared_memory;
  void* stream;
  const struct Attribute* attributes;
  unsigned attribute_count;
};
_Static_assert(sizeof(struct Attribute) == 72 && sizeof(struct Config) == 56, "as in cuda.h");

// Triton launches by this one, and the package's launcher, too.
int cuLaunchKernelEx(const struct Config* c, struct Function* f, void** parameters, void** extra) {
  struct Launch what = {f, {0}, {0}, c->shared_memory, c->attribute_count, 0, c->stream, NULL};
  memcpy(what.grid, c->grid, sizeof c->grid);
  memcpy(what.block, c->block, sizeof c->block);
  for (unsigned i = 0; i < c->attribute_count; i++)  // 6: programmatic stream serialization
    what.early |= c->attributes[i].id == 6 && c->attributes[i].value.number;
  return launch(&what, parameters);
}

// 128 bytes into which all arguments go, so that a map, which is a parameter of a launch, tells how
// it was encoded. `flags` is for Triton, which clears that bit (21 of the second word) in the maps
// of tensors below 128 KiB under drivers up to 13.1.
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address,
                           const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                           const uint32_t* steps, int interleave, int swizzle, int promotion,
                           int fill) {
  if (rank < 1 || rank > 5 || (uintptr_t)map % 64 || (uintptr_t)address % 16)
    return failed(INVALID_VALUE);
  struct {
    uint64_t address;
    uint8_t type, rank, flags, interleave, swizzle, promotion, fill, zero;
    uint64_t sizes[5], strides[4];
    uint32_t box[5], steps[5];
  } all = {(uintptr_t)address, type, rank, 1 << 5, interleave, swizzle, promotion, fill, 0,
           {0}, {0}, {0}, {0}};
  _Static_assert(sizeof all == 128, "a tensor map has 128 bytes");
  memcpy(all.sizes, sizes, rank * sizeof *sizes);
  memcpy(all.strides, strides, (rank - 1) * sizeof *strides);
  memcpy(all.box, box, rank * sizeof *box);
  memcpy(all.steps, steps, rank * sizeof *steps);
  memcpy(map, &all, sizeof all);
  return 0;
}

// Contexts: a thread begins without one, a device has one.
int cuCtxGetCurrent(void** context) { return *context = current, 0; }
int cuCtxSetCurrent(void* context) { return current = context, 0; }
int cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  if (device < 0 || device >= DEVICES) return failed(INVALID_VALUE);
  return *context = &contexts[device], 0;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  return capture_mode = *mode, *mode = before, 0;
}

// Modules and functions: every one has a handle of its own. Nothing here allocates memory of a
// device: whoever wants to finds no such function.
int cuModuleLoadData(void** module, const void* image) {
  if (adalora_fake_capture && capture_mode != RELAXED) {
    adalora_fake_capture = -1;
    return failed(CAPTURE_UNSUPPORTED);
  }
  __atomic_fetch_add(&adalora_fake_loads, 1, __ATOMIC_RELAXED);
  return (*module = malloc(1)) ? 0 : failed(OUT_OF_MEMORY);
}
int cuModuleGetFunction(struct Function** function, void* module, const char* name) {
  if (!(*function = calloc(1, sizeof **function))) return failed(OUT_OF_MEMORY);
  strncpy((*function)->name, name, sizeof(*function)->name - 1);
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, struct Function* function) {
  return *value = attribute == 0 ? 1024 : 0, 0;  // 0: the most threads of a block
}
int cuFuncSetAttribute(struct Function* function, int attribute, int value) {
  if (attribute == 8) function->shared_memory = value;  // 8: the most dynamic shared memory
  return 0;
}
int cuFuncSetCacheConfig(struct Function* function, int config) { return 0; }

// The rest of what Triton asks for: an H200's answers.
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int of_an_h200[][2] = {{1, 1024},    {10, 32},      {12, 65536}, {13, 1980000},
                               {16, 132},    {36, 3201000}, {37, 6144},  {75, 9},
                               {76, 0},      {81, 233472},  {97, 232448}};
  for (size_t i = 0; i < sizeof of_an_h200 / sizeof *of_an_h200; i++)
    if (of_an_h200[i][0] == attribute) return *value = of_an_h200[i][1], 0;
  return failed(INVALID_VALUE);
}
int cuGetErrorString(int error, const char** text) {
  return *text = error == CAPTURE_UNSUPPORTED   ? "operation not permitted when stream is capturing"
                 : error == CAPTURE_INVALIDATED ? "operation failed due to a previous error"
                 : error == INVALID_CONTEXT ? "invalid device context"
                 : error == INVALID_HANDLE ? "invalid resource handle"
                 : error == OUT_OF_MEMORY  ? "out of memory"
                 : error == INVALID_VALUE  ? "invalid argument"
                                           : "unknown error",
         0;
}
int cuOccupancyMaxActiveClusters(int* count, void* f, const void* config) { return *count = 1, 0; }
int cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
  return *(uint64_t*)value = pointer, 0;
}
int cuTensorMapEncodeIm2col(void) { return failed(INVALID_VALUE); }
