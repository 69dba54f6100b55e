// SPDX-License-Identifier: Apache-2.0
// Memory of a GPU that is mapped where we want it (cuMemCreate), and that other processes can map too.
#pragma once

#include <cstdint>
#include <string>

#include "transport/cuda/api.h"
#include "transport/transport.h"

namespace m2n {

using Allocation = CUmemGenericAllocationHandle;

// Throws Error(kSetup) that names `what`.
void check_driver(CUresult result, const std::string& what);

// The size that maps are made of: 2 MiB on all devices so far.
uint64_t map_granularity(int ordinal);

// Throws Error(kSetup) where NICs cannot write memory of the GPU so that its kernels see rows before their signal.
void require_gpu_direct(int ordinal);

// `bytes`: a multiple of the granularity. Whoever makes or imports one releases it; its memory stays as long as it is
// mapped somewhere, whatever becomes of the process that made it.
Allocation make_allocation(int ordinal, uint64_t bytes, bool is_for_nics = false);
// A descriptor by which another process of this machine maps it; none where the system does not allow that.
Fd export_allocation(int ordinal, Allocation allocation);
Allocation import_allocation(int fd);

void allow_access(int ordinal, CUdeviceptr at, uint64_t bytes, CUmemAccess_flags flags);

// The device's name for other processes, which may count devices in another order: its UUID in hex digits.
std::string device_uuid(int ordinal);
// Which of this process's devices that is. Throws Error(kSetup): none of them, or `ordinal` cannot reach it.
int reachable_device(int ordinal, const std::string& uuid);

}  // namespace m2n
