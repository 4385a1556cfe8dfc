// The ops on a CPU. Results do not depend on the number of threads.
#pragma once

#include "../ops.h"

namespace adalora::cpu {

void importance_update(const ImportanceUpdate& op);
void orth_reg(const OrthReg& op);
void orth_reg_backward(const OrthRegBackward& op);
void allocate(const Allocate& op);

}  // namespace adalora::cpu
