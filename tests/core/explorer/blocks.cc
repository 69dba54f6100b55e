// SPDX-License-Identifier: Apache-2.0
// Several blocks of threads run one verb, launch after launch, some of them aborted: core/arrive.h.
//
// Block 0 decides: it waits for the reply that frees the slot, or gives up. All blocks put their part of the message,
// the last to arrive signals, and the last to leave clears what the launch shared. Then comes the next launch. A block
// is one thread here; exec.sync() has nothing to do.
#include M2N_EXPLORER  // explore.h or with_relacy.h

#include "core/peer.h"

namespace {

using explorer::await;
using explorer::check;

constexpr size_t kMaxBlocks = 3;
constexpr uint32_t kLaunches = 2;
constexpr uint32_t kGo = 1;
constexpr uint32_t kAbort = 2;
constexpr uint8_t kGoNote = 0;      // messages that were decided on
constexpr uint8_t kSignalNote = 1;  // messages that were signalled
constexpr uint8_t kLeaveNote = 2;   // launches that were finished

struct Shared {
  m2n::Signal dispatch;
  m2n::Signal reply;
  unsigned char rows[kMaxBlocks];
  m2n::Gate gate;
  uint32_t arrivals;
  unsigned char plan;  // what decide() leaves for all blocks
  uint32_t is_over;
} shared;

size_t num_blocks = 2;

struct Exec {
  size_t index;
  uint32_t thread() const { return 0; }
  uint32_t num_threads() const { return 1; }
  uint32_t block() const { return static_cast<uint32_t>(index); }
  uint32_t num_blocks() const { return static_cast<uint32_t>(::num_blocks); }
  void sync() {}
  void wake(m2n::WakeWord*) {}
  void pause() { explorer::pause_after_load(); }
};

uint64_t count(uint8_t which) {
  const uint64_t next = explorer::noted(which) + 1;
  explorer::note(which, next);
  return next;
}

uint32_t decide_launch() {
  if (explorer::choose(2) == 0) return kAbort;
  const auto sent = static_cast<uint32_t>(explorer::noted(kGoNote));
  if (sent != 0)
    await([&] { return m2n::look_for(&shared.reply, sent - 1, [] { return true; }) == m2n::Look::kArrived; });
  explorer::write_byte(&shared.plan, static_cast<unsigned char>(count(kGoNote)));
  return kGo;
}

void send(Exec& exec) {
  const unsigned char seq = explorer::read_byte(&shared.plan);
  const auto row = static_cast<unsigned char>(seq * 16 + exec.block());
  m2n::put(exec, &shared.rows[exec.block()], &row, 1);
  if (!m2n::drain(exec, &shared.arrivals)) return;
  check(count(kSignalNote) == seq, "a message is signalled twice");
  m2n::signal(exec, m2n::PeerView{}, &shared.dispatch, m2n::make_signal(exec.num_blocks(), seq));
}

void run_block(size_t index) {
  Exec exec{index};
  for (uint64_t launch = 1; launch <= kLaunches; ++launch) {
    const uint32_t verdict = m2n::decide(exec, &shared.gate, decide_launch);
    check(verdict == kGo || verdict == kAbort, "a verdict that nobody gave");
    if (verdict == kGo) send(exec);
    if (m2n::leave(exec, &shared.gate)) check(count(kLeaveNote) == launch, "a launch is finished twice");
    explorer::barrier(num_blocks);
    check(explorer::noted(kLeaveNote) == launch, "a launch is over and nobody has finished it");
    check(explorer::noted(kSignalNote) == explorer::noted(kGoNote),
          "a message was not signalled, or an aborted one was");
    explorer::barrier(num_blocks);  // the next launch makes new notes
  }
  if (index == 0) m2n::store_release(&shared.is_over, 1u);
}

void receive() {
  for (uint32_t last = 0;; ++last) {
    m2n::Look found = m2n::Look::kPending;
    await([&] {
      found = m2n::look_for(&shared.dispatch, last, [] { return m2n::load_acquire(&shared.is_over) == 0; });
      return found != m2n::Look::kPending;
    });
    if (found == m2n::Look::kGone) return check(last == explorer::noted(kSignalNote), "a message was lost");
    check(found == m2n::Look::kArrived, "a violation that nobody committed");
    for (uint32_t block = 0; block < num_blocks; ++block) {
      check(explorer::read_byte(&shared.rows[block]) == (last + 1) * 16 + block, "the row of another message");
    }
    m2n::store_signal(&shared.reply, m2n::make_signal(0, last + 1));
  }
}

void body(size_t thread) { thread < num_blocks ? run_block(thread) : receive(); }

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc == 2 ? argv[1] : "";
  if (name != "two_blocks" && name != "three_blocks") return 2;
  num_blocks = name == "two_blocks" ? 2 : 3;
  explorer::search.run(num_blocks + 1, body, shared);
  return 0;
}
