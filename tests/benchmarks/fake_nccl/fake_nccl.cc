// SPDX-License-Identifier: Apache-2.0
// In NCCL's place where there is no GPU: its one-sided puts between processes of one host, through files that all map.
// As strict as NCCL with arguments, and a put of a group is done at the group's end. By the environment:
// FAKE_NCCL_FOLDER (for the files), FAKE_NCCL_VERSION, FAKE_NCCL_FAULT ("lose": no row arrives; "windows": none).
#include <fcntl.h>
#include <nccl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

constexpr int kMaxRanks = 8;

// What the ranks of a communicator share.
struct Control {
  std::atomic<int> num_joined, num_registered;
  char memory[kMaxRanks][128];                          // file of each rank's window
  std::atomic<uint64_t> signals[kMaxRanks][kMaxRanks];  // of the receiver, by sender
};

struct ncclComm {
  Control* control;
  int rank, num_ranks;
  uint64_t awaited[kMaxRanks];
};

struct ncclWindow_vidmem {
  unsigned char* memory[kMaxRanks];  // of each rank, as this process maps it
  size_t size;
};

namespace {

struct Allocation {
  std::string path;
  size_t size;
};

struct Put {
  ncclComm_t comm;
  const void* from;
  unsigned char* to;
  size_t size;
  int peer;
};

std::map<void*, Allocation> allocations;
std::map<ncclComm_t, ncclWindow_t> windows;
std::vector<Put> group;
int group_depth = 0, num_files = 0;
std::string last_error;

ncclResult_t refuse(ncclResult_t result, const char* words) {
  last_error = words;
  return result;
}

bool has_fault(const char* name) {
  const char* fault = std::getenv("FAKE_NCCL_FAULT");
  return fault != nullptr && std::strcmp(fault, name) == 0;
}

std::string new_path() {
  const char* folder = std::getenv("FAKE_NCCL_FOLDER");
  return std::string(folder != nullptr ? folder : ".") + "/" + std::to_string(getpid()) + "-" +
         std::to_string(num_files++);
}

// Zeroed when it is new.
void* map_file(const std::string& path, size_t size) {
  const int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, static_cast<off_t>(size)) != 0) return nullptr;
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return memory == MAP_FAILED ? nullptr : memory;
}

void meet(std::atomic<int>& count, int num_ranks) {
  ++count;
  while (count < num_ranks) sched_yield();
}

void run(const Put& put) {
  if (!has_fault("lose")) std::memcpy(put.to, put.from, put.size);
  ++put.comm->control->signals[put.peer][put.comm->rank];
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  const char* text = std::getenv("FAKE_NCCL_VERSION");
  *version = text != nullptr ? std::atoi(text) : 22902;
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t) { return "an error of the fake"; }
const char* ncclGetLastError(ncclComm_t) { return last_error.c_str(); }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::snprintf(id->internal, sizeof id->internal, "%s", new_path().c_str());
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int num_ranks, ncclUniqueId id, int rank) {
  if (num_ranks > kMaxRanks || rank >= num_ranks) return refuse(ncclInvalidArgument, "rank");
  auto* control = static_cast<Control*>(map_file(id.internal, sizeof(Control)));
  if (control == nullptr) return refuse(ncclSystemError, "no file for the communicator");
  *comm = new ncclComm{control, rank, num_ranks, {}};
  meet(control->num_joined, num_ranks);
  return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  if (windows.contains(comm)) return refuse(ncclInvalidUsage, "a window is still registered");
  munmap(comm->control, sizeof(Control));
  delete comm;
  return ncclSuccess;
}

ncclResult_t ncclMemAlloc(void** memory, size_t size) {
  const std::string path = new_path();
  *memory = map_file(path, size);
  if (*memory == nullptr) return refuse(ncclSystemError, "no file for memory");
  allocations[*memory] = {path, size};
  return ncclSuccess;
}

ncclResult_t ncclMemFree(void* memory) {
  const auto found = allocations.find(memory);
  if (found == allocations.end()) return refuse(ncclInvalidArgument, "not from ncclMemAlloc");
  munmap(memory, found->second.size);
  allocations.erase(found);
  return ncclSuccess;
}

ncclResult_t ncclCommWindowRegister(ncclComm_t comm, void* memory, size_t size, ncclWindow_t* window, int flags) {
  const auto found = allocations.find(memory);
  if (flags != NCCL_WIN_COLL_SYMMETRIC || found == allocations.end() || size > found->second.size) {
    return refuse(ncclInvalidArgument, "window");
  }
  *window = nullptr;
  if (has_fault("windows")) return ncclSuccess;  // as NCCL says it
  Control& control = *comm->control;
  std::snprintf(control.memory[comm->rank], sizeof control.memory[0], "%s", found->second.path.c_str());
  meet(control.num_registered, comm->num_ranks);
  *window = new ncclWindow_vidmem{{}, size};
  for (int rank = 0; rank < comm->num_ranks; ++rank) {
    (*window)->memory[rank] =
        static_cast<unsigned char*>(rank == comm->rank ? memory : map_file(control.memory[rank], size));
  }
  windows[comm] = *window;
  return ncclSuccess;
}

ncclResult_t ncclCommWindowDeregister(ncclComm_t comm, ncclWindow_t window) {
  for (int rank = 0; rank < comm->num_ranks; ++rank) {
    if (rank != comm->rank) munmap(window->memory[rank], window->size);
  }
  delete window;
  windows.erase(comm);
  return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
  ++group_depth;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
  if (group_depth == 0) return refuse(ncclInvalidUsage, "no group has been started");
  if (--group_depth > 0) return ncclSuccess;
  for (const Put& put : group) run(put);
  group.clear();
  return ncclSuccess;
}

ncclResult_t ncclPutSignal(const void* from, size_t count, ncclDataType_t type, int peer, ncclWindow_t window,
                           size_t offset, int signal, int context, unsigned int flags, ncclComm_t comm, cudaStream_t) {
  if (signal != 0 || context != 0 || flags != 0) return refuse(ncclInvalidArgument, "must be 0");
  if (type != ncclUint8 || peer < 0 || peer >= comm->num_ranks) return refuse(ncclInvalidArgument, "type or peer");
  const unsigned char* own = window->memory[comm->rank];
  const auto begin = static_cast<const unsigned char*>(from);
  if (begin < own || begin + count > own + window->size) {
    return refuse(ncclInvalidArgument, "the source is not in a valid symmetric window");
  }
  if (offset + count > window->size) return refuse(ncclInvalidArgument, "behind the peer's window");
  const Put put{comm, from, window->memory[peer] + offset, count, peer};
  if (group_depth > 0) {
    group.push_back(put);
  } else {
    run(put);
  }
  return ncclSuccess;
}

ncclResult_t ncclWaitSignal(int num_descs, ncclWaitSignalDesc_t* descs, ncclComm_t comm, cudaStream_t) {
  if (group_depth > 0) return refuse(ncclInvalidUsage, "the fake waits in no group");
  for (int i = 0; i < num_descs; ++i) {
    const ncclWaitSignalDesc_t& desc = descs[i];
    if (desc.opCnt <= 0 || desc.sigIdx != 0 || desc.ctx != 0) return refuse(ncclInvalidArgument, "descriptor");
    comm->awaited[desc.peer] += static_cast<uint64_t>(desc.opCnt);
    while (comm->control->signals[comm->rank][desc.peer] < comm->awaited[desc.peer]) sched_yield();
  }
  return ncclSuccess;
}
}
