// SPDX-License-Identifier: Apache-2.0
// Set-up and end of all links of a rank, and what is told of them.
#include "exchange/links/membership.h"

#include <algorithm>
#include <limits>

namespace m2n {
namespace {

std::string name_of(Role role, uint32_t rank) {
  return (role == Role::kExpert ? "expert rank " : "attention rank ") + std::to_string(rank);
}

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

Membership::Membership(Role role, uint32_t rank, uint32_t max_peers, std::unique_ptr<Transport> transport,
                       const Shape& shape)
    : Waiting(name_of(role, rank)),
      role_(role),
      rank_(rank),
      transport_(std::move(transport)),
      layout_(make_layout(shape, transport_->page_bytes())),
      max_peers_(checked_max_peers(shape, max_peers, rows())),
      words_(transport_->make_words(kLineBytes + max_peers * sizeof(PeerEntry))),
      peers_(make_peer_table(words_.get(), max_peers)),
      rows_window_(transport_->make_rows_window(rows().object_bytes, rows().stride_bytes, max_peers)),
      meta_window_(transport_->make_window(meta().object_bytes, meta().object_bytes, max_peers)),
      links_(max_peers),
      relay_(transport_->make_relay(uint64_t{role == Role::kExpert} << 32 | rank)) {
  start_watcher();  // where there can be no thread, it is said now and not when the first peer joins
  exec_ = HostExec(own_wake_, relay_.get(), &network_);
  if (!transport_->shares_memory()) make_network();
}

void Membership::make_network() {
  if (network_owner_ != nullptr) return;
  auto network = transport_->make_network();
  if (network == nullptr) throw Error(Failure::kSetup, own_name() + ": its transport reaches no other host");
  network->open(this, own_wake_, {max_peers_, peer_rows().object_bytes, peer_meta().object_bytes});
  network_owner_ = std::move(network);
  network_.set(network_owner_.get());
}

Membership::~Membership() {
  if (network_owner_ != nullptr && is_own_process()) network_owner_->close();  // its thread calls this object
  for (Link& link : links_) link.exposed.reset();                              // before the network's memory goes
}

void Membership::close() {
  // A child owns neither the links nor the windows, and the lock may be held.
  if (!is_own_process()) return set_closed();
  {
    std::lock_guard lock(mutex_);
    if (is_closed()) return;
    set_closed();
    exec_.wake_own();
  }
  if (relay_ != nullptr) relay_->drain();
  Network* network = network_.get();
  if (network != nullptr) network->drain();
  {
    std::lock_guard lock(mutex_);
    for (uint32_t i = 0; i < peers_.size(); ++i) {
      if (links_[i].ticket != 0) unwatch_peer(links_[i].ticket, /*say_goodbye=*/true);
    }
  }
  if (network != nullptr) network->close();
  let_go_of_peers();
}

bool Membership::is_lost(uint32_t peer_idx) const {
  return peers_.state(peer_idx) == PeerState::kLost && load_relaxed(&peers_.entries[peer_idx].is_given_up) == 0 &&
         peers_.find(rank_of(peer_idx)) == static_cast<int32_t>(peer_idx);
}

bool Membership::wait_peer(uint32_t peer_rank, int64_t deadline_ns) {
  const auto is_here = [&] {
    const int32_t peer_idx = peers_.find(peer_rank);
    return peer_idx >= 0 && peers_.is_live(static_cast<uint32_t>(peer_idx));
  };
  return wait(is_here, deadline_ns) == WaitResult::kReady;
}

std::vector<PeerInfo> Membership::peer_infos() const {
  std::lock_guard lock(mutex_);
  std::vector<PeerInfo> infos(history_.begin(), history_.end());
  for (uint32_t i = 0; i < peers_.size(); ++i) {
    if (peers_.state(i) != PeerState::kUnused) infos.push_back(info_locked(i));
  }
  const auto by_joining = [](const PeerInfo& a, const PeerInfo& b) { return a.joined < b.joined; };
  std::sort(infos.begin(), infos.end(), by_joining);
  return infos;
}

PeerInfo Membership::info_of(uint32_t peer_idx) const {
  std::lock_guard lock(mutex_);
  return info_locked(peer_idx);
}

std::vector<std::pair<uint32_t, ClockOffset>> Membership::clock_offsets() const {
  std::lock_guard lock(mutex_);
  std::vector<std::pair<uint32_t, ClockOffset>> offsets;
  for (uint32_t i = 0; i < peers_.size(); ++i) {
    if (!peers_.is_live(i)) continue;
    const ClockOffset offset = clock_offset(links_[i].ticket);
    if (offset.round_trip_ns != 0) offsets.emplace_back(rank_of(i), offset);
  }
  return offsets;
}

std::string Membership::peer_name(uint32_t peer_rank) const {
  return name_of(role_ == Role::kExpert ? Role::kAttention : Role::kExpert, peer_rank);
}

void Membership::recover(uint32_t peer_rank) {
  give_up(peer_rank);
  return_gone();
}

std::string Membership::words_for_violator(uint32_t peer_idx, const std::string& what) const {
  return peer_name(rank_of(peer_idx)) + " broke the protocol, as " + own_name() + " saw it: " + what;
}

}  // namespace m2n
