// SPDX-License-Identifier: Apache-2.0
// Guesses what a stream has to wait for, and ends waits that nobody else would.
#include "exchange/device/stream_waits.h"

#include <chrono>

#include "transport/host_exec.h"
#include "transport/own_thread.h"

namespace m2n {
namespace {

constexpr auto kPause = std::chrono::milliseconds(1);

bool is_reached(uint32_t counted, uint32_t wanted) { return static_cast<int32_t>(counted - wanted) >= 0; }

}  // namespace

StreamWaits::StreamWaits(DeviceMemory& memory, uint32_t num_slots, uint32_t max_peers, uint32_t first_seq, Sight sight)
    : memory_(memory),
      max_peers_(max_peers),
      first_seq_(first_seq),
      sight_(std::move(sight)),
      words_(memory.on_host<WaitWords>(num_slots + 1)),
      seqs_(memory.on_host<uint32_t>(uint64_t{num_slots} * max_peers)),
      slots_(num_slots) {
  for (uint32_t i = 0; i < num_slots * max_peers; ++i) seqs_[i] = first_seq;
  // Throws where streams cannot wait by themselves; the words behind those of the slots are nobody's.
  memory.machine().wait_words({}, &words_[num_slots].begun, &words_[num_slots].passed, 1, nullptr);
  thread_ = start_own_thread("m2n-waits", [this] { run(); });
}

void StreamWaits::begin_round(uint32_t slot, std::vector<uint32_t> peers) {
  const std::lock_guard lock(mutex_);
  Slot& state = slots_[slot];
  ++state.rounds;
  if (peers == state.peers) return;
  state.peers = std::move(peers);
  state.first_alike = state.rounds;
}

void StreamWaits::doubt(uint32_t slot) {
  const std::lock_guard lock(mutex_);
  slots_[slot].first_alike = slots_[slot].rounds + 1;
}

void StreamWaits::forget(uint32_t peer_idx) {
  const std::lock_guard lock(mutex_);
  for (uint32_t slot = 0; slot < slots_.size(); ++slot) {
    store_release(&seqs_[slot * max_peers_ + peer_idx], first_seq_);  // SYNC: wait-round
    slots_[slot].first_alike = slots_[slot].rounds + 1;
  }
}

std::vector<StreamWaits::Awaited> StreamWaits::guess(const Slot& state, uint32_t slot) const {
  std::vector<Awaited> awaited;
  for (const uint32_t peer_idx : state.peers) {
    const uint32_t seq = load_acquire(&seqs_[slot * max_peers_ + peer_idx]);  // SYNC: wait-round
    awaited.push_back({sight_.signal(peer_idx, slot), peer_idx, seq});
  }
  const uint32_t told = load_relaxed(&words_[slot].rounds);  // SYNC: wait-round
  const uint32_t num_more = state.rounds - told;
  // Rounds with other peers, or in doubt, are under way, or too many.
  if (!is_reached(told + 1, state.first_alike) || num_more > kMostAhead / 2) return {};
  for (Awaited& each : awaited) each.seq += num_more;
  return awaited;
}

StreamWait StreamWaits::launch(uint32_t slot, int64_t timeout_ns, Stream stream) {
  std::unique_lock lock(mutex_);
  Slot& state = slots_[slot];
  const StreamWait wait{words_ + slot, seqs_ + slot * max_peers_, ++state.tickets, state.rounds};
  const std::vector<Awaited> awaited = guess(state, slot);
  if (awaited.empty()) return wait;
  pending_.push_back({slot, wait.ticket, timeout_ns, awaited});
  ++counts_.launched;
  lock.unlock();
  is_changed_.notify_one();
  std::vector<Machine::WordWait> waits;
  for (const Awaited& each : awaited) waits.push_back({reinterpret_cast<uint32_t*>(each.word), each.seq});
  memory_.machine().wait_words(waits, &wait.words->begun, &wait.words->passed, wait.ticket, stream);
  return wait;
}

void StreamWaits::run() {
  std::unique_lock lock(mutex_);
  while (!is_stopped_) {
    if (pending_.empty()) {
      is_changed_.wait(lock);
    } else {
      is_changed_.wait_for(lock, kPause);
    }
    std::erase_if(pending_, [this](Pending& pending) { return !look_after(pending); });
  }
}

bool StreamWaits::look_after(Pending& pending) {
  WaitWords& words = words_[pending.slot];
  if (is_reached(load_acquire(&words.passed), pending.ticket)) return false;  // SYNC: wait-passed
  // What the slot's verbs did before it is seen by who sees this.
  if (!is_reached(load_acquire(&words.begun), pending.ticket)) return true;  // SYNC: wait-begun
  if (pending.begun_ns == 0) pending.begun_ns = now_ns();
  const Control* control = memory_.control();
  const bool is_late = now_ns() - pending.begun_ns >= read_timeout(control, pending.timeout_ns);
  const bool is_over = is_late || load_acquire(&control->abort) != 0;  // SYNC: verb-abort
  if (is_over) store_release(&words.ended, pending.ticket);            // SYNC: wait-ended
  const bool ends_all = is_over || sight_.is_troubled(pending.slot);
  for (const Awaited& each : pending.awaited) {
    if (ends_all || !sight_.is_live(each.peer_idx)) counts_.ended += run_ahead(each.word, each.seq);
  }
  return true;  // until the stream says so: the peer's signal may have come in between, with a seq before
}

void StreamWaits::stop() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    is_stopped_ = true;
  }
  is_changed_.notify_one();
  thread_.join();
}

}  // namespace m2n
