// SPDX-License-Identifier: Apache-2.0
// Set-up and end of a comm, and what it tells; the same for both roles.
#include "exchange/links/membership.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "transport/choice.h"

namespace m2n {
namespace {

uint32_t checked_max_peers(const Shape& shape, uint32_t max_peers, const Rows& rows) {
  const auto refuse = [](const std::string& text) { throw Error(Failure::kArgument, text); };
  if (shape.microbatches + 1 > kMaxSlots) {
    refuse("microbatches: at most " + std::to_string(kMaxSlots - 1) + ", got " + std::to_string(shape.microbatches));
  }
  if (shape.combine_dtype == DType::kFloat8E4M3) refuse("combine_dtype: rows of float8 are only dispatched");
  if (max_peers == 0 || max_peers > kMaxPeers) {
    refuse("max_peers: expected 1 to " + std::to_string(kMaxPeers) + ", got " + std::to_string(max_peers));
  }
  const uint64_t window_rows = rows.stride_rows * max_peers;
  if (window_rows > static_cast<uint64_t>(std::numeric_limits<int32_t>::max())) {
    refuse("max_peers: a window of " + std::to_string(window_rows) +
           " rows cannot be indexed by int32; lower max_peers, max_tokens or microbatches");
  }
  if (uint64_t{shape.max_tokens} * shape.top_k >= kPlainRows) {
    refuse("max_tokens: max_tokens x top_k must be below " + std::to_string(kPlainRows) +
           "; send larger ones in chunks");
  }
  return max_peers;
}

// The count on a line of its own, then the entries.
PeerTable make_peer_table(void* words, uint32_t max_peers) {
  auto* entries = reinterpret_cast<PeerEntry*>(static_cast<unsigned char*>(words) + kLineBytes);
  for (uint32_t i = 0; i < max_peers; ++i) new (entries + i) PeerEntry{};
  return {entries, new (words) uint32_t{0}};
}

}  // namespace

Comm::Comm(Role role, const Shape& shape, uint32_t rank, uint32_t max_peers, const std::string& transport)
    : role_(role),
      shape_(shape),
      transport_(make_transport(transport)),
      layout_(make_layout(shape, transport_->page_bytes())),
      rank_(rank),
      max_peers_(checked_max_peers(shape, max_peers, rows())),
      fork_count_(m2n::fork_count()),
      words_(transport_->make_words(kLineBytes + max_peers * sizeof(PeerEntry))),
      peers_(make_peer_table(words_.get(), max_peers)),
      host_transport_(make_host_transport()),
      relay_(transport_->make_relay(uint64_t{role == Role::kExpert} << 32 | rank)),
      exec_(nullptr) {
  links_.resize(max_peers);
  start_watcher();  // where there can be no thread, it is said now and not when the first peer joins
  rows_window_ = transport_->make_rows_window(rows().object_bytes, rows().stride_bytes, max_peers);
  meta_window_ = transport_->make_window(meta().object_bytes, meta().object_bytes, max_peers);
  wake_window_ = host_transport_->make_window(kPageBytes, kPageBytes, 1);
  wake_handle_ = wake_window_->add_object(0);
  own_wake_ = reinterpret_cast<WakeWord*>(wake_window_->data());
  exec_ = HostExec(own_wake_, relay_.get(), &network_);
  if (!transport_->shares_memory()) make_network();
}

void Comm::make_network() {
  if (network_owner_ != nullptr) return;
  auto network = transport_->make_network();
  if (network == nullptr) throw Error(Failure::kSetup, own_name() + ": its transport reaches no other host");
  network->open(this, own_wake_, {max_peers_, peer_rows().object_bytes, peer_meta().object_bytes});
  network_owner_ = std::move(network);
  network_.set(network_owner_.get());
}

Comm::~Comm() {
  if (network_owner_ != nullptr && is_own_process()) network_owner_->close();  // its thread calls this object
  for (Link& link : links_) link.exposed.reset();                              // before the network's memory goes
}

void Comm::close() {
  if (!is_own_process()) {           // a child owns neither the links nor the windows, and the lock may be held
    store_seq_cst(&is_closed_, 1u);  // SYNC: comm-closed
    return;
  }
  {
    std::lock_guard lock(membership_mutex_);
    if (is_closed()) return;
    store_seq_cst(&is_closed_, 1u);  // SYNC: comm-closed
    exec_.wake_own();
  }
  if (relay_ != nullptr) relay_->drain();
  Network* network = network_.get();
  if (network != nullptr) network->drain();
  {
    std::lock_guard lock(membership_mutex_);
    for (uint32_t i = 0; i < peers_.size(); ++i) {
      if (links_[i].ticket != 0) unwatch_peer(links_[i].ticket, /*say_goodbye=*/true);
    }
  }
  if (network != nullptr) network->close();
  let_go_of_peers();
}

void Comm::check() {
  require_usable();
  for (uint32_t i = 0; i < peers_.size(); ++i) {
    if (is_lost(i)) raise_lost(i, "check()");
  }
}

bool Comm::is_lost(uint32_t peer_idx) const {
  return peers_.state(peer_idx) == PeerState::kLost && load_relaxed(&peers_.entries[peer_idx].is_given_up) == 0 &&
         peers_.find(rank_of(peer_idx)) == static_cast<int32_t>(peer_idx);
}

bool Comm::wait_peer(uint32_t peer_rank, int64_t deadline_ns) {
  const auto is_here = [&] {
    const int32_t peer_idx = peers_.find(peer_rank);
    return peer_idx >= 0 && peers_.is_live(static_cast<uint32_t>(peer_idx));
  };
  return wait(is_here, deadline_ns) == WaitResult::kReady;
}

std::vector<PeerInfo> Comm::peer_infos() const {
  std::lock_guard lock(membership_mutex_);
  std::vector<PeerInfo> infos(history_.begin(), history_.end());
  for (uint32_t i = 0; i < peers_.size(); ++i) {
    if (peers_.state(i) != PeerState::kUnused) infos.push_back(info_of(i));
  }
  const auto by_joining = [](const PeerInfo& a, const PeerInfo& b) { return a.joined < b.joined; };
  std::sort(infos.begin(), infos.end(), by_joining);
  return infos;
}

std::vector<std::pair<uint32_t, ClockOffset>> Comm::clock_offsets() const {
  std::lock_guard lock(membership_mutex_);
  std::vector<std::pair<uint32_t, ClockOffset>> offsets;
  for (uint32_t i = 0; i < peers_.size(); ++i) {
    if (!peers_.is_live(i)) continue;
    const ClockOffset offset = clock_offset(links_[i].ticket);
    if (offset.round_trip_ns != 0) offsets.emplace_back(rank_of(i), offset);
  }
  return offsets;
}

Stats Comm::stats() const {
  Stats copy;
  // Relaxed: counters that nothing is decided by.
  copy.messages_sent = load_relaxed(&stats_.messages_sent);
  copy.messages_received = load_relaxed(&stats_.messages_received);
  copy.rows_sent = load_relaxed(&stats_.rows_sent);
  copy.rows_received = load_relaxed(&stats_.rows_received);
  copy.bytes_sent = load_relaxed(&stats_.bytes_sent);
  copy.bytes_received = load_relaxed(&stats_.bytes_received);
  copy.bytes_packed = load_relaxed(&stats_.bytes_packed);
  copy.wait_ns = load_relaxed(&stats_.wait_ns);
  const HeldSignals held = relay_ == nullptr ? HeldSignals{} : relay_->held();
  copy.signals_held = held.count;
  copy.held_ns = held.total_ns;
  return copy;
}

void Comm::require_usable() const {
  if (!is_own_process()) {
    throw Error(Failure::kSetup, own_name() +
                                     ": this comm was made before fork() and cannot be used in the child; make a "
                                     "comm in the child, or start processes with 'spawn'");
  }
  if (is_closed()) throw Error(Failure::kSetup, own_name() + ": the comm is closed");
}

void Comm::require_microbatch(uint32_t microbatch) const {
  require_usable();
  if (microbatch < shape_.microbatches) return;
  throw Error(Failure::kArgument, "microbatch: expected 0 to " + std::to_string(shape_.microbatches - 1) + ", got " +
                                      std::to_string(microbatch));
}

std::string Comm::peer_name(uint32_t peer_rank) const {
  return (role_ == Role::kExpert ? "attention rank " : "expert rank ") + std::to_string(peer_rank);
}

std::string Comm::own_name() const {
  return (role_ == Role::kExpert ? "expert rank " : "attention rank ") + std::to_string(rank_);
}

void Comm::list_pieces(const Signal* word, Signal value, std::vector<Piece>& pieces) const {
  const auto* at = reinterpret_cast<const unsigned char*>(word);
  const auto is_in = [&](uint32_t peer_idx) {
    if (peers_.state(peer_idx) == PeerState::kUnused) return false;  // its view may be written just now
    const unsigned char* meta = peers_.entries[peer_idx].view.meta;
    return at >= meta && at < meta + peer_meta().object_bytes;
  };
  uint32_t peer_idx = 0;
  while (!is_in(peer_idx)) ++peer_idx;
  const PeerView& view = peers_.entries[peer_idx].view;
  const auto slot = static_cast<uint32_t>(static_cast<uint64_t>(at - view.meta) / kLineBytes);
  const auto add = [&](unsigned char* bytes, uint64_t num_bytes) {
    if (num_bytes != 0) pieces.push_back({bytes, bytes, num_bytes});
  };
  const uint64_t num_rows = signal_rows(value) == kRefusedRows ? 0 : signal_rows(value);
  const uint64_t num_ids = role_ == Role::kAttention ? num_rows * layout_.top_k : 0;
  add(view.meta + peer_meta().header(slot), sizeof(Header));
  add(view.meta + peer_meta().ids(slot), num_ids * sizeof(int32_t));
  add(view.meta + peer_meta().weights(slot), num_ids * sizeof(float));
  add(view.rows + peer_rows().row_in_object(slot, 0) * peer_rows().row_bytes, num_rows * peer_rows().row_bytes);
}

}  // namespace m2n
