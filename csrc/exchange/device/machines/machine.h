// SPDX-License-Identifier: Apache-2.0
// Where the verbs of a device comm run: one launch a verb, in the order of a stream.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "exchange/device/verbs/attention.h"
#include "exchange/device/verbs/expert.h"
#include "exchange/device/verbs/route.h"

namespace m2n {

// Launches for one type of rows each, so that a kernel holds the code of no other.
template <class In>
struct DispatchSendAs {  // rows of In become float8
  DispatchVerb verb;
};
template <class T>
struct CombineRecvAs {
  CombineRecvVerb verb;
};
template <class In, class Out>
struct CombineSendAs {
  CombineSendVerb verb;
};
template <class Exec, class In>
M2N_HD void run(Exec& exec, const DispatchSendAs<In>& typed) {
  run_as<In>(exec, typed.verb);
}
template <class Exec, class T>
M2N_HD void run(Exec& exec, const CombineRecvAs<T>& typed) {
  run_as<T>(exec, typed.verb);
}
template <class Exec, class In, class Out>
M2N_HD void run(Exec& exec, const CombineSendAs<In, Out>& typed) {
  run_as<In, Out>(exec, typed.verb);
}
template <class Body>
void with_types(const DispatchVerb& verb, Body&& body) {
  if (verb.view.shape.dispatch_dtype != DType::kFloat8E4M3) return body(verb);
  with_dtype(verb.x_dtype, [&](auto in) { body(DispatchSendAs<decltype(in)>{verb}); });
}
template <class Body>
void with_types(const CombineRecvVerb& verb, Body&& body) {
  with_dtype(verb.view.shape.combine_dtype, [&](auto element) { body(CombineRecvAs<decltype(element)>{verb}); });
}
template <class Body>
void with_types(const CombineSendVerb& verb, Body&& body) {
  with_dtypes(verb.y_dtype, verb.view.shape.combine_dtype,
              [&](auto in, auto out) { body(CombineSendAs<decltype(in), decltype(out)>{verb}); });
}

// A stream of the machine's own kind (a cudaStream_t); nullptr is its default one.
using Stream = void*;

class Machine {
 public:
  virtual ~Machine() = default;

  // Zeroed memory for what launches share; freed when the last owner goes.
  virtual std::shared_ptr<void> allocate(uint64_t bytes) = 0;
  // Copies from or to memory of allocate() and returns when it is there. Waits for no launch.
  virtual void copy(void* to, const void* from, uint64_t bytes) = 0;
  // Is the stream being recorded into a graph? Launches are, then; marks must not be.
  virtual bool is_capturing(Stream stream) = 0;
  // Waits for all launches, whatever launched them.
  virtual void synchronize_all() = 0;

  // A mark in a stream: record() sets it behind all launches so far; wait() lets a stream, synchronize() this thread,
  // wait until they are done. A mark that was never set is passed at once.
  virtual std::shared_ptr<void> make_event() = 0;
  virtual void record(void* event, Stream stream) = 0;
  virtual void wait(Stream stream, void* event) = 0;
  virtual void synchronize(void* event) = 0;
  virtual bool is_passed(void* event) = 0;

  // The stream stores `ticket` in *begun, waits until each word has come to its value (both wrap), and stores it in
  // *passed: nothing else ends that. All words lie in memory of the host.
  struct WordWait {
    const uint32_t* word;
    uint32_t value;
  };
  virtual void wait_words(const std::vector<WordWait>& waits, uint32_t* begun, uint32_t* passed, uint32_t ticket,
                          Stream stream) = 0;

  // On one block of threads.
  virtual void launch(const RouteVerb& verb, Stream stream) = 0;
  virtual void launch(const AwaitVerb& verb, Stream stream) = 0;
  virtual void launch(const PollVerb& verb, Stream stream) = 0;
  virtual void launch(const ReceiveVerb& verb, Stream stream) = 0;
  // On at most `num_sms` blocks, and no more than `num_bytes` of payload are worth.
  virtual void launch(const DispatchVerb& verb, uint32_t num_sms, uint64_t num_bytes, Stream stream) = 0;
  virtual void launch(const CombineRecvVerb& verb, uint32_t num_sms, uint64_t num_bytes, Stream stream) = 0;
  virtual void launch(const CombineSendVerb& verb, uint32_t num_sms, uint64_t num_bytes, Stream stream) = 0;
};

// "emulated": threads of this process. "cuda:0": that device. Throws Error(kSetup) with the reason.
std::unique_ptr<Machine> make_machine(const std::string& device);

}  // namespace m2n
