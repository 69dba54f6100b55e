// SPDX-License-Identifier: Apache-2.0
// Fuzzes what expert peers write into an attention rank's window: replies of any seq, size, header and rows, at any
// time. What must come of them is computed again in the simplest way.
#include <functional>

#include "attention_model.h"
#include "harness.h"

namespace {

using namespace fuzz;
using namespace m2n;

constexpr uint32_t kMaxOps = 48;

class World {
 public:
  World(ReduceAt reduce_at, uint32_t first_seq)
      : shape_{kHidden, kExperts, kTopK, kMaxTokens, kMicrobatches, DType::kFloat32, DType::kFloat32, reduce_at},
        first_seq_(first_seq) {
    renew();
  }

  void run(Bytes& bytes) {
    for (uint32_t i = 0; i < kMaxOps && !bytes.is_empty(); ++i) step(bytes);
    settle();
    if (is_spoiled_) renew();
  }

 private:
  void renew() {
    if (comm_) comm_->close();
    peers_.clear();
    for (Flight& flight : flights_) flight = Flight{};
    g_first_seq = first_seq_;
    comm_ = std::make_shared<AttentionComm>(shape_, 0, kMaxLives, "shm");
    layout_ = comm_->layout();
    while (desks_.size() < kMostLinks) {
      desks_.push_back(std::make_unique<Desk>(layout_.dispatch_rows, layout_.dispatch_meta));
    }
    for (uint32_t rank = 0; rank < kRanks; ++rank) join(rank);
    is_spoiled_ = false;
  }

  void join(uint32_t rank) {
    uint32_t num_used = 0, kept = 0;  // bits: indices that somebody has
    for (const Peer& peer : peers_) num_used += has_index(peer);
    if (peers_.size() == kMostLinks || num_used == kMaxLives) return;
    for (const Peer& peer : peers_) kept |= uint32_t{has_index(peer) && is_held(peer)} << peer.fake->idx();
    Peer* replaced = newest(rank);
    Peer peer;
    peer.fake = std::make_unique<FakePeer>(*comm_, *desks_[peers_.size()], rank);
    require((kept >> peer.fake->idx() & 1) == 0, "an index is one peer's at a time");
    for (Lane& lane : peer.lanes) lane.sent = first_seq_;
    if (replaced != nullptr) replaced->is_live = false;
    peers_.push_back(std::move(peer));
    is_spoiled_ = true;
  }

  bool has_index(const Peer& peer) const { return !peer.fake->info(*comm_).is_returned; }

  // Of a peer that has an index: does it surely stay?
  bool is_held(const Peer& peer) {
    const bool is_lost = !peer.is_live && !peer.has_left && !peer.is_given_up && newest(peer.fake->rank()) == &peer;
    bool owes_rows = false;
    for (const Flight& flight : flights_) {
      for (const uint32_t link : flight.peer_of_rank) owes_rows |= flight.is_busy && link == link_of(peer);
    }
    return peer.is_live || !peer.fake->has_let_go() || is_lost || owes_rows;
  }

  uint32_t link_of(const Peer& peer) const { return static_cast<uint32_t>(&peer - peers_.data()); }

  void step(Bytes& bytes) {
    // What ends a link is rare: it costs a new comm afterwards.
    const uint32_t what = bytes.below(64);
    if (what == 0) return end_peer(bytes);
    if (what == 1) return give_up(bytes.below(kRanks + 1), &Comm::recover);
    if (what == 2) return join(bytes.below(kRanks));
    if (what == 3) return let_go(bytes);
    if (what == 4) return drop(bytes.below(kRanks + 1));
    if (what < 7) return idle();
    if (what < 10) return ask(bytes.below(kMicrobatches));
    if (what < 22) return send(bytes, bytes.below(kMicrobatches));
    if (what < 34) return receive(bytes.below(kMicrobatches), bytes.below(4) == 0);
    Peer& peer = peers_[bytes.below(static_cast<uint32_t>(peers_.size()))];
    if (!peer.fake->has_let_go()) write_reply(bytes, layout_, peer);
  }

  bool is_any(uint32_t slot, Reply wanted) const {
    for (uint32_t link : flights_[slot].peer_of_rank) {
      if (link < kMissing && reply_of(layout_, peers_[link], slot) == wanted) return true;
    }
    return false;
  }

  bool may_be_gone(uint32_t slot) const {
    for (uint32_t link : flights_[slot].peer_of_rank) {
      if (link < kMissing && peers_[link].lanes[slot].was_gone) return true;
    }
    return false;
  }

  // Before a verb that looks at the replies of a slot.
  void note_gone(uint32_t slot) {
    for (uint32_t link : flights_[slot].peer_of_rank) {
      if (link >= kMissing || reply_of(layout_, peers_[link], slot) != Reply::kGone) continue;
      peers_[link].lanes[slot].was_gone = true;
    }
  }

  // A protocol error that is no refusal: its culprit was dropped, deserved it, and knows.
  void note_drop(const Error& error) {
    bool is_deserved = false;
    for (Peer& peer : peers_) {  // all lives of the rank: an older one may still owe a reply
      if (static_cast<int>(peer.fake->rank()) != error.peer_rank()) continue;
      bool is_broken = false;
      for (uint32_t slot = 0; slot < kMicrobatches; ++slot) {
        if (reply_of(layout_, peer, slot) != Reply::kBroken) continue;
        is_broken = peer.lanes[slot].was_gone = true;  // what it owed does not come, whatever it writes there later
      }
      const PeerInfo info = peer.fake->info(*comm_);
      require(info.state != PeerState::kLive || peer.is_live, "who is gone does not come back");
      is_deserved |= is_broken && info.state != PeerState::kLive;
      if (!peer.is_live || info.state == PeerState::kLive) continue;
      require(is_broken && info.cause == LossCause::kProtocol, "who is dropped has broken the protocol");
      require(peer.fake->is_told(), "who is dropped is told");
      peer.is_live = false;
    }
    require(is_deserved, "who breaks the protocol is dropped");
    is_spoiled_ = true;
  }

  // The ends that every call may have because of what peers do.
  void note_error(const Error& error) {
    is_spoiled_ = true;
    if (error.kind() == Failure::kProtocol) return note_drop(error);
    require(error.kind() == Failure::kPeerLost, "only kProtocol and kPeerLost");
    bool is_any_gone = false;
    for (const Peer& peer : peers_) {
      is_any_gone |= !peer.is_live && static_cast<int>(peer.fake->rank()) == error.peer_rank();
    }
    require(is_any_gone, "kPeerLost is for a peer that is gone");
  }

  // Nobody who is live owes a reply on this slot: else a message would overwrite what is still read.
  bool is_credit_there(uint32_t slot) const {
    for (const Peer& peer : peers_) {
      if (peer.is_live && !peer.lanes[slot].is_answered) return false;
    }
    return true;
  }

  void send(Bytes& bytes, uint32_t slot) {
    Flight flight = make_flight(bytes);
    const auto route = std::make_shared<Route>(shape_);
    route->prepare(flight.num_tokens, kRanks);
    route->build_from_topk(&flight.ids[0][0], &flight.weights[0][0], {0, 1, 2, 3, 4, 5, 6}, {0, 1, 0, 1, 0, 1}, 0);
    const bool has_credit = is_credit_there(slot);
    const std::vector<unsigned char> x(size_t{flight.num_tokens} * layout_.dispatch_rows.row_bytes, 0x3C);
    try {
      comm_->dispatch_send(x.data(), layout_.dispatch_rows.row_bytes, shape_.dispatch_dtype, route, slot, kLayer, 0);
    } catch (const Error& error) {
      if (error.kind() == Failure::kSlotBusy) return require(flights_[slot].is_busy, "kSlotBusy is for a busy slot");
      if (error.kind() == Failure::kTimeout)
        return require(!has_credit, "kTimeout is for a peer that has not answered");
      return note_error(error);
    }
    require(!flights_[slot].is_busy && has_credit, "a slot is dispatched again only after all its replies");
    flight.is_busy = true;
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      const uint32_t num_rows = route->view().row_offsets[rank + 1] - route->view().row_offsets[rank];
      Peer* peer = newest(rank);
      flight.peer_of_rank[rank] = num_rows != 0 ? link_of(*peer) : kNobody;
      if (!peer->is_live) continue;
      const uint32_t pairs = route->view().pair_counts[rank];
      check_sent(*peer, slot, num_rows, shape_.reduce_at == ReduceAt::kExpert ? num_rows : pairs);
    }
    flights_[slot] = flight;
  }

  // A peer has a message with the next seq, and nothing in it is out of range.
  void check_sent(Peer& peer, uint32_t slot, uint32_t num_rows, uint32_t reply_rows) {
    Lane& lane = peer.lanes[slot];
    lane = {lane.sent + 1, false, reply_rows, false};
    // A peer may have rung this seq before the message: then it counts as its reply.
    lane.is_answered = signal_seq(peer.fake->signal_at(layout_.combine_meta.signal(slot))) == lane.sent;
    const Signal seen = peer.fake->answer_at(layout_.dispatch_meta.signal(slot));
    require(seen == make_signal(num_rows, lane.sent), "the signal of a message");
    const Header header = peer.fake->answer_header(layout_.dispatch_meta.header(slot));
    require(header.num_rows == num_rows && header.microbatch == slot, "the header of a message");
    for (uint32_t i = 0; i < num_rows * kTopK; ++i) {
      int32_t id;
      std::memcpy(&id, peer.fake->desk_meta() + layout_.dispatch_meta.ids(slot) + i * sizeof id, sizeof id);
      const bool is_of_rank =
          id >= 0 && id < static_cast<int32_t>(kExperts) && id % 2 == static_cast<int>(peer.fake->rank());
      require(is_of_rank || (id == -1 && i % kTopK != 0), "the ids of a message");
    }
  }

  void receive(uint32_t slot, bool takes_nan = false) {
    Flight& flight = flights_[slot];
    // Exactly as large as it must be, so that a write behind it is found.
    std::vector<float> y(size_t{flight.num_tokens} * kHidden, 77.0f);
    if (flight.is_busy) note_gone(slot);
    try {
      comm_->combine_recv(reinterpret_cast<unsigned char*>(y.data()), kHidden * sizeof(float), slot, 0, takes_nan);
    } catch (const Error& error) {
      if (!flight.is_busy) return require(error.kind() == Failure::kArgument, "nothing was dispatched");
      if (error.kind() == Failure::kTimeout)
        return require(is_any(slot, Reply::kPending), "kTimeout: a reply is missing");
      if (error.kind() == Failure::kPeerLost) {
        require(may_be_gone(slot) && !takes_nan, "kPeerLost: a reply will never come");
        require(!error.owed().empty() && comm_->missing(slot) == error.owed(), "and the rows are told");
      }
      if (error.kind() == Failure::kProtocol && !comm_->is_busy(slot)) {
        require(is_any(slot, Reply::kRefused), "a refusal frees the slot");
        require(!is_any(slot, Reply::kPending) && !is_any(slot, Reply::kGone), "once every reply is there");
        flight.is_busy = false;
        return;
      }
      return note_error(error);
    }
    require(flight.is_busy, "what was not dispatched is not received");
    bool is_right = false;
    for (uint32_t missing = 0; missing < 1u << kRanks; ++missing)
      is_right |= is_sum(flight, missing, slot, takes_nan, y);
    require(is_right, "good replies are summed, and nothing else");
    flight.is_busy = false;
  }

  // Is it the sum of good replies, without the rows of `missing` (bits: ranks)? A verdict may have been there before
  // the reply, so who is gone may be missing.
  bool is_sum(Flight flight, uint32_t missing, uint32_t slot, bool takes_nan, const std::vector<float>& y) const {
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      uint32_t& link = flight.peer_of_rank[rank];
      if (link >= kMissing) continue;
      const Peer& peer = peers_[link];
      const bool is_missing = missing >> rank & 1;
      const bool may_be = is_missing ? takes_nan && (peer.lanes[slot].was_gone || !peer.is_live)
                                     : reply_of(layout_, peer, slot) == Reply::kGood;
      if (!may_be) return false;
      if (is_missing) link = kMissing;
    }
    uint32_t rows[kRanks] = {};   // of the tokens so far
    uint32_t pairs[kRanks] = {};  // in the order of the rows
    for (uint32_t token = 0; token < flight.num_tokens; ++token) {
      std::vector<std::pair<uint32_t, uint32_t>> sources;  // (rank, reply row)
      std::vector<float> weights;
      uint32_t counts[kRanks] = {};
      for (uint32_t k = 0; k < kTopK; ++k) {
        const int32_t id = flight.ids[token][k];
        if (id == -1) continue;
        const auto rank = static_cast<uint32_t>(id % 2);
        if (shape_.reduce_at == ReduceAt::kAttention) sources.emplace_back(rank, pairs[rank]++);
        weights.push_back(flight.weights[token][k]);
        ++counts[rank];
      }
      for (uint32_t rank = 0; shape_.reduce_at == ReduceAt::kExpert && rank < kRanks; ++rank) {
        if (counts[rank] != 0) sources.emplace_back(rank, rows[rank]++);
      }
      for (uint32_t h = 0; h < kHidden; ++h) {
        float total = 0.0f;
        bool is_lost = false;
        for (size_t i = 0; i < sources.size(); ++i) {
          is_lost |= flight.peer_of_rank[sources[i].first] == kMissing;
          if (is_lost) break;
          const float value =
              reply_value(layout_, peers_[flight.peer_of_rank[sources[i].first]], slot, sources[i].second, h);
          total += shape_.reduce_at == ReduceAt::kExpert ? value : weights[i] * value;
        }
        const float seen = y[size_t{token} * kHidden + h];
        if (is_lost) total = NAN;
        if (std::isnan(total) ? !std::isnan(seen) : seen != total) return false;
      }
    }
    return true;
  }

  void ask(uint32_t slot) {
    try {
      if (flights_[slot].is_busy) note_gone(slot);
      const bool is_ready = comm_->is_ready(slot);
      const bool is_free = comm_->is_free(slot);
      require(!is_ready || is_free || may_be_gone(slot) || !is_any(slot, Reply::kPending),
              "a slot in flight is ready when no reply is missing");
      require(flights_[slot].is_busy || is_ready == is_free, "a slot with nothing in flight is ready when it is free");
      require(!is_free || is_credit_there(slot), "a slot is free when every message has its reply");
      require(comm_->wait_ready({slot}, 0) == (is_ready ? 0 : -1), "wait_ready says what is_ready says");
    } catch (const Error& error) {
      note_error(error);
    }
  }

  void idle() {
    bool had_credit[kMicrobatches];
    for (uint32_t slot = 0; slot < kMicrobatches; ++slot) had_credit[slot] = is_credit_there(slot);
    bool is_cut_short = false;
    try {
      comm_->idle(0);
    } catch (const Error& error) {
      is_cut_short = true;
      if (error.kind() != Failure::kTimeout) note_error(error);
    }
    for (uint32_t slot = 0; slot < kMicrobatches; ++slot) {
      for (Peer& peer : peers_) {
        const uint32_t seen = signal_seq(peer.fake->answer_at(layout_.dispatch_meta.signal(slot)));
        const bool is_new = seen == peer.lanes[slot].sent + 1;
        require(is_cut_short || !peer.is_live || flights_[slot].is_busy || is_new, "idle tells everybody");
        if (!is_new) continue;
        require(had_credit[slot] && !flights_[slot].is_busy, "a slot is used again only after all its replies");
        check_sent(peer, slot, 0, 0);
      }
    }
  }

  void end_peer(Bytes& bytes) {
    Peer& peer = peers_[bytes.below(static_cast<uint32_t>(peers_.size()))];
    if (!peer.is_live) return;
    peer.has_left = bytes.below(2) == 1;
    peer.fake->hang_up(*comm_, peer.has_left);
    peer.is_live = false;
    is_spoiled_ = true;
  }

  Peer* newest(uint32_t rank) {
    Peer* found = nullptr;
    for (Peer& peer : peers_) {
      if (peer.fake->rank() == rank) found = &peer;
    }
    return found;
  }

  void let_go(Bytes& bytes) {
    Peer& peer = peers_[bytes.below(static_cast<uint32_t>(peers_.size()))];
    if (!peer.is_live && !peer.fake->has_let_go()) peer.fake->let_go();
  }

  void drop(uint32_t rank) {
    Peer* peer = newest(rank);
    const bool was_live = peer != nullptr && peer->is_live;
    if (was_live) peer->is_live = false;
    give_up(rank, [](Comm& comm, uint32_t gone) { comm.drop(gone, "enough"); });
    is_spoiled_ |= was_live;
    require(!was_live || peer->fake->is_told(), "who is dropped is told");
  }

  // Every life of that rank that is gone.
  template <class Call>
  void give_up(uint32_t rank, const Call& call) {
    const bool is_known = newest(rank) != nullptr;
    try {
      std::invoke(call, *comm_, rank);
      require(is_known, "only who was there can be given up");
    } catch (const Error& error) {
      return require(!is_known && error.kind() == Failure::kArgument, "who was there can be given up");
    }
    for (Peer& peer : peers_) peer.is_given_up |= peer.fake->rank() == rank && !peer.is_live;
  }

  // Everybody answers as it should; then all is as at the start.
  void settle() {
    for (uint32_t slot = 0; slot < kMicrobatches && !is_spoiled_; ++slot) {
      for (Peer& peer : peers_) {
        Lane& lane = peer.lanes[slot];
        Header header{};
        header.num_rows = lane.reply_rows;
        header.layer = kLayer;
        header.microbatch = slot;
        std::memcpy(peer.fake->meta() + layout_.combine_meta.header(slot), &header, sizeof header);
        peer.fake->ring(layout_.combine_meta.signal(slot), make_signal(lane.reply_rows, lane.sent));
        lane.is_answered = true;
      }
      if (flights_[slot].is_busy) receive(slot);
      require(!flights_[slot].is_busy && comm_->is_free(slot), "with all replies every slot becomes free");
    }
  }

  const Shape shape_;
  const uint32_t first_seq_;
  Layout layout_{};
  std::shared_ptr<AttentionComm> comm_;
  std::vector<std::unique_ptr<Desk>> desks_;
  std::vector<Peer> peers_;  // all links that there have been, in order
  Flight flights_[kMicrobatches];
  bool is_spoiled_ = false;  // the next input needs a new comm
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // Sums at the expert and at the attention rank; message numbers from 0, and just before they wrap.
  static World worlds[] = {{ReduceAt::kExpert, 0},
                           {ReduceAt::kAttention, 0},
                           {ReduceAt::kExpert, 0xFFFFFFFDu},
                           {ReduceAt::kAttention, 0xFFFFFFFDu}};
  fuzz::Bytes bytes(data, size);
  worlds[bytes.below(4)].run(bytes);
  return 0;
}
