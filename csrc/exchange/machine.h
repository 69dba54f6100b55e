// SPDX-License-Identifier: Apache-2.0
// Where the verbs of a device comm run: one launch a verb, in the order of a stream.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "exchange/attention_verbs.h"
#include "exchange/expert_verbs.h"
#include "exchange/route_verb.h"

namespace m2n {

// A stream of the machine's own kind (a cudaStream_t); nullptr is its default one.
using Stream = void*;

class Machine {
 public:
  virtual ~Machine() = default;

  // Zeroed memory for what launches share; freed when the last owner goes.
  virtual std::shared_ptr<void> allocate(uint64_t bytes) = 0;
  // Copies to memory of allocate() and returns when it is there.
  virtual void upload(void* to, const void* from, uint64_t bytes) = 0;

  // A mark in a stream: record() sets it behind all launches so far; wait() lets a stream, synchronize() this thread,
  // wait until they are done. A mark that was never set is passed at once.
  virtual std::shared_ptr<void> make_event() = 0;
  virtual void record(void* event, Stream stream) = 0;
  virtual void wait(Stream stream, void* event) = 0;
  virtual void synchronize(void* event) = 0;

  virtual void launch(const RouteVerb& verb, Stream stream) = 0;
  virtual void launch(const DispatchVerb& verb, Stream stream) = 0;
  virtual void launch(const CombineRecvVerb& verb, Stream stream) = 0;
  virtual void launch(const PollVerb& verb, Stream stream) = 0;
  virtual void launch(const ReceiveVerb& verb, Stream stream) = 0;
  virtual void launch(const CombineSendVerb& verb, Stream stream) = 0;
};

// "emulated": threads of this process. "cuda:0": that device. Throws Error(kSetup) with the reason.
std::unique_ptr<Machine> make_machine(const std::string& device);

}  // namespace m2n
