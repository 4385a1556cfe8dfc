// The ops on a CUDA device. Everything is launched on `stream`, nothing is read back, and nothing
// is copied from the host: what a launch needs to know travels in its arguments, so that a captured
// graph keeps it. Results do not depend on the device.
//
// `workspace` is device memory of at least the number of bytes that <op>_workspace returns, aligned
// to 256; it is used by this call only and need not be initialised.
#pragma once

#include <cuda_runtime.h>

#include "../ops.h"

namespace adalora::cuda {

int64_t importance_update_workspace(const ImportanceUpdate& op);
cudaError_t importance_update(const ImportanceUpdate& op, void* workspace, cudaStream_t stream);

int64_t orth_reg_workspace(const OrthReg& op);
cudaError_t orth_reg(const OrthReg& op, void* workspace, cudaStream_t stream);
cudaError_t orth_reg_backward(const OrthRegBackward& op, cudaStream_t stream);

cudaError_t allocate(const Allocate& op, cudaStream_t stream);

}  // namespace adalora::cuda
