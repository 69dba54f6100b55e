// SPDX-License-Identifier: Apache-2.0
// Fuzzes what attention peers write into an expert rank's window: signals, headers, ids, weights, in any order of
// messages, peers and slots. A model beside the comm says what must come of each message.
#include <optional>

#include "exchange/host/expert.h"
#include "expert_model.h"
#include "harness.h"

namespace {

using namespace fuzz;
using namespace m2n;

constexpr uint32_t kMostLinks = 8;
constexpr uint32_t kMaxOps = 48;

// One comm with its peers. It lives on while nobody breaks the protocol, so that most inputs are cheap.
class World {
 public:
  World(ReduceAt reduce_at, uint32_t first_seq) : shape_(make_shape(reduce_at)), first_seq_(first_seq) { renew(); }

  void run(Bytes& bytes) {
    for (uint32_t i = 0; i < kMaxOps && !bytes.is_empty(); ++i) step(bytes);
    settle();
    if (is_spoiled_) renew();
  }

 private:
  void renew() {
    if (comm_) comm_->close();
    batches_.clear();
    peers_.clear();
    g_first_seq = first_seq_;
    comm_ = std::make_shared<ExpertComm>(shape_, 0, kMaxLives, "shm", kLocal);
    layout_ = comm_->layout();
    while (desks_.size() < kMostLinks) {
      desks_.push_back(std::make_unique<Desk>(layout_.combine_rows, layout_.combine_meta));
    }
    join(0);
    join(1);
    is_spoiled_ = false;
  }

  void join(uint32_t rank) {
    uint32_t num_used = 0, kept = 0;  // bits: indices that somebody has
    for (const Peer& peer : peers_) num_used += may_keep_index(peer);
    if (peers_.size() == kMostLinks || num_used >= kMaxLives) return;
    peers_.close_gone(layout_);
    for (const Peer& peer : peers_) kept |= uint32_t{has_index(peer) && is_held(peer)} << peer.fake->idx();
    Peer* replaced = peers_.newest(rank);
    Peer peer;
    peer.fake = std::make_unique<FakePeer>(*comm_, *desks_[peers_.size()], rank);
    require((kept >> peer.fake->idx() & 1) == 0, "an index is one peer's at a time");
    for (Box& box : peer.boxes) box.accepted = box.replied = first_seq_;
    if (replaced != nullptr) replaced->is_live = false;
    peers_.push_back(std::move(peer));
    peers_.close_gone(layout_);
    is_spoiled_ = true;
  }

  bool has_index(const Peer& peer) const { return !peer.fake->info(*comm_).is_returned; }

  bool is_in_batch(const Peer& peer) const {
    for (const auto& batch : batches_) {
      for (const BatchMessage& message : batch->messages) {
        if (message.arrived.peer_idx == peer.fake->idx()) return true;
      }
    }
    return false;
  }

  // Of a peer that has an index: does it surely stay?
  bool is_held(const Peer& peer) {
    bool is_held = peer.is_live || !peer.fake->has_let_go() || peers_.is_lost(peer) || is_in_batch(peer);
    for (const Box& box : peer.boxes) is_held |= box.is_pending && !box.is_doubtful && peers_.is_served(peer);
    return is_held;
  }

  // Also with what was not looked at yet, and behind an older link of the same rank.
  bool may_keep_index(const Peer& peer) {
    if (!has_index(peer)) return false;
    bool may_keep = is_held(peer);
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      const Box& box = peer.boxes[slot];
      const Signal signal = peer.fake->signal_at(layout_.dispatch_meta.signal(slot));
      const bool is_new = !peer.is_closed && signal_seq(signal) != box.accepted;
      may_keep |= (box.is_pending || is_new) && peers_.is_served(peer);
    }
    for (const Peer* older = peers_.data(); older != &peer; ++older) {
      may_keep |= older->fake->rank() == peer.fake->rank() && has_index(*older);
    }
    return may_keep;
  }

  void step(Bytes& bytes) {
    // What ends a link is rare: it costs a new comm afterwards.
    const uint32_t what = bytes.below(64);
    if (what == 0) return end_peer(bytes);
    if (what == 1) return recover(bytes.below(3));
    if (what == 2) return join(bytes.below(3));
    if (what == 3) return let_go(bytes);
    if (what == 4) return drop(bytes.below(3));
    if (what < 7) return look_for_work();
    if (what < 14) return answer(bytes);
    if (what < 32) return receive(bytes);
    const Peer& peer = peers_[bytes.below(static_cast<uint32_t>(peers_.size()))];
    if (!peer.fake->has_let_go()) write_message(bytes, layout_, peer);
  }

  // Idle messages without rows are answered at once.
  void check_idle_answers() const {
    for (const Peer& peer : peers_) {
      for (uint32_t slot = 0; slot < kSlots; ++slot) {
        const Box& box = peer.boxes[slot];
        if (box.replied == first_seq_) continue;
        const Signal answer = peer.fake->answer_at(layout_.combine_meta.signal(slot));
        require(signal_seq(answer) == box.replied, "every message that is done with has its answer");
      }
    }
  }

  // Takes note of the messages that were refused since the last look; how many there were.
  uint32_t note_refusals() {
    uint32_t num_refused = 0;
    for (Peer& peer : peers_) {
      for (uint32_t slot = 0; slot < kSlots; ++slot) {
        Box& box = peer.boxes[slot];
        if (!box.is_pending) continue;
        const Signal answer = peer.fake->answer_at(layout_.combine_meta.signal(slot));
        if (answer != make_signal(kRefusedRows, box.accepted)) continue;
        const Header header = peer.fake->answer_header(layout_.combine_meta.header(slot));
        require(judge(layout_, peer, slot) == Verdict::kNotHosted, "only a message for experts of others is refused");
        require(header.num_rows == kRefusedRows && local_idx(static_cast<int32_t>(header.detail)) == kNone,
                "a refusal names an expert that is not hosted");
        box.is_pending = box.is_doubtful = false;
        box.replied = box.accepted;
        ++num_refused;
      }
    }
    return num_refused;
  }

  void receive(Bytes& bytes) { receive(make_wanted(bytes)); }

  // False when there was nothing to receive.
  bool receive(const Wanted& wanted) {
    peers_.close_gone(layout_);
    Peer* culprit = peers_.scan(layout_);
    std::shared_ptr<Batch> batch;
    try {
      batch = comm_->dispatch_recv(wanted, 0);
    } catch (const Error& error) {
      note_refusals();
      note_error(error, culprit, wanted.is_strict());
      return true;
    }
    require(!culprit, "what breaks the protocol is noticed by dispatch_recv");
    const uint32_t num_refused = note_refusals();
    check_idle_answers();
    if (batch != nullptr) {
      check_batch(*batch, wanted);
      batches_.push_back(std::move(batch));
      return true;
    }
    for (const Peer& peer : peers_) {
      for (uint32_t slot = 0; slot < kMicrobatches; ++slot) {
        const Box& box = peer.boxes[slot];
        const bool is_wanted = (wanted.is_any_layer || wanted.layer == box.header.layer) &&
                               (wanted.is_any_microbatch || wanted.microbatch == slot);
        const bool is_there = box.is_pending && !box.is_doubtful && peers_.is_served(peer);
        require(num_refused != 0 || wanted.is_strict() || !is_there || !is_wanted, "what can be received is received");
      }
    }
    return num_refused != 0;
  }

  void note_error(const Error& error, Peer* culprit, bool is_strict) {
    is_spoiled_ = true;
    if (error.kind() == Failure::kProtocol) return note_drop(error, culprit);
    require(culprit == nullptr, "what breaks the protocol is told before anything else");
    if (error.kind() == Failure::kTimeout) return require(is_strict, "only a strict receive times out with an error");
    require(error.kind() == Failure::kPeerLost, "only kProtocol, kPeerLost, and kTimeout where strict");
    bool is_any_lost = false;
    for (const Peer& peer : peers_) is_any_lost |= peers_.is_lost(peer);
    require(is_any_lost || is_strict, "kPeerLost is for a peer that is gone");
  }

  // Somebody broke the protocol: by a message that was looked at now, or by what is in one that waited. Who is there is
  // dropped, and must know.
  void note_drop(const Error& error, Peer* culprit) {
    Peer* dropped = culprit;
    if (dropped == nullptr) {
      dropped = peers_.newest(static_cast<uint32_t>(error.peer_rank()));
      std::vector<Box*> broken;
      for (uint32_t slot = 0; slot < kMicrobatches && dropped != nullptr; ++slot) {
        Box& box = dropped->boxes[slot];
        if (box.is_pending && judge(layout_, *dropped, slot) == Verdict::kBroken) broken.push_back(&box);
      }
      require(!broken.empty() && peers_.is_served(*dropped), "who is dropped has broken the protocol");
      for (Box* box : broken) (broken.size() == 1 ? box->is_pending : box->is_doubtful) = broken.size() != 1;
    }
    require(error.peer_rank() == static_cast<int>(dropped->fake->rank()), "the error names who broke the protocol");
    if (!dropped->is_live) return;
    const PeerInfo info = dropped->fake->info(*comm_);
    require(info.state == PeerState::kLost && info.cause == LossCause::kProtocol, "who breaks the protocol is dropped");
    require(dropped->fake->is_told(), "who is dropped is told");
    dropped->is_live = false;
  }

  void check_batch(const Batch& batch, const Wanted& wanted) {
    require(wanted.is_any_layer || batch.layer == wanted.layer, "the layer that was asked for");
    require(wanted.is_any_microbatch || batch.microbatch == wanted.microbatch, "the microbatch that was asked for");
    std::vector<std::pair<int32_t, float>> by_expert[kExperts];  // (window row, weight), by local expert
    std::vector<std::pair<int32_t, uint32_t>> wire;              // (window row, local expert)
    uint32_t num_rows = 0;
    for (const BatchMessage& message : batch.messages) {
      Peer& peer = *peers_.at_index(message.arrived.peer_idx);
      Box& box = peer.boxes[message.arrived.slot];
      require(peers_.is_served(peer) && box.is_pending && message.arrived.slot == batch.microbatch,
              "a message that waited");
      require(box.header.layer == batch.layer && message.seq == box.accepted, "the message that was accepted");
      require(message.arrived.num_rows == box.header.num_rows && message.first_row == num_rows, "its rows");
      require(judge(layout_, peer, batch.microbatch) == Verdict::kFine, "only good messages are received");
      box.is_pending = box.is_doubtful = false;
      for (uint32_t row = 0; row < box.header.num_rows; ++row) {
        const uint64_t at = layout_.dispatch_rows.row_in_window(message.arrived.peer_idx, batch.microbatch, row);
        require(at < comm_->window_rows(), "rows lie in the window");
        require(batch.pair_begin.at(num_rows + row) == static_cast<int32_t>(wire.size()), "pair_begin");
        for (uint32_t k = 0; k < kTopK; ++k) {
          const int32_t id = ids_of(layout_, peer, batch.microbatch)[row * kTopK + k];
          if (id == -1) break;
          const auto expert = static_cast<uint32_t>(local_idx(id));
          wire.emplace_back(static_cast<int32_t>(at), expert);
          by_expert[expert].emplace_back(static_cast<int32_t>(at),
                                         weights_of(layout_, peer, batch.microbatch)[row * kTopK + k]);
        }
      }
      num_rows += box.header.num_rows;
    }
    require(batch.num_rows() == num_rows && batch.num_pairs() == wire.size(), "the numbers of rows and pairs");
    check_lists(batch, by_expert, wire);
  }

  void look_for_work() {
    Peer* culprit = peers_.scan(layout_);
    try {
      const std::optional<Work> work = comm_->wait_work(0);
      require(!culprit, "what breaks the protocol is noticed by wait_work");
      bool is_any = false;
      for (const Peer& peer : peers_) {
        for (uint32_t slot = 0; slot < kMicrobatches; ++slot) {
          const Box& box = peer.boxes[slot];
          if (!box.is_pending || !peers_.is_served(peer)) continue;
          is_any |= work ? work->layer == box.header.layer && work->microbatch == slot : !box.is_doubtful;
        }
      }
      require(is_any == work.has_value(), "wait_work names a message that waits");
    } catch (const Error& error) {
      note_error(error, culprit, false);
    }
  }

  void answer(Bytes& bytes) {
    if (batches_.empty()) return;
    const auto which = batches_.begin() + bytes.below(static_cast<uint32_t>(batches_.size()));
    const std::shared_ptr<Batch> batch = *which;
    batches_.erase(which);
    const bool is_reduced = shape_.reduce_at == ReduceAt::kExpert && bytes.below(2) == 1;
    const auto dtype = static_cast<DType>(bytes.below(3));
    const uint64_t row_bytes = shape_.hidden * uint64_t{dtype_bytes(dtype)};
    const uint32_t num_rows = is_reduced ? batch->num_rows() : batch->num_pairs();
    // Exactly as large as it must be, so that a read behind it is found.
    const std::vector<unsigned char> y(num_rows * row_bytes, bytes.take<uint8_t>());
    comm_->combine_send(*batch, y.data(), row_bytes, dtype, is_reduced);
    const auto box_of = [&](const BatchMessage& message) -> Box& {
      return peers_.at_index(message.arrived.peer_idx)->boxes[message.arrived.slot];
    };
    for (const BatchMessage& message : batch->messages) box_of(message).replied = message.seq;
    peers_.close_gone(layout_);
    for (const BatchMessage& message : batch->messages) {
      const Peer& peer = *peers_.at_index(message.arrived.peer_idx);
      // What a peer that is gone sent too early, against the protocol, is answered already where it was empty.
      if (!peer.is_live && box_of(message).replied != message.seq) continue;
      const auto first = static_cast<size_t>(message.first_row);
      const uint32_t num_pairs =
          static_cast<uint32_t>(batch->pair_begin[first + message.arrived.num_rows] - batch->pair_begin[first]);
      const uint32_t expected = shape_.reduce_at == ReduceAt::kExpert ? message.arrived.num_rows : num_pairs;
      const Signal seen = peer.fake->answer_at(layout_.combine_meta.signal(message.arrived.slot));
      require(seen == make_signal(expected, message.seq), "the reply announces its rows");
      const Header header = peer.fake->answer_header(layout_.combine_meta.header(message.arrived.slot));
      require(header.num_rows == expected && header.layer == batch->layer, "the reply's header");
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

  void let_go(Bytes& bytes) {
    Peer& peer = peers_[bytes.below(static_cast<uint32_t>(peers_.size()))];
    if (!peer.is_live && !peer.fake->has_let_go()) peer.fake->let_go();
  }

  void drop(uint32_t rank) {
    Peer* peer = peers_.newest(rank);
    const bool was_live = peer != nullptr && peer->is_live;
    if (was_live) peer->is_live = false;
    give_up(rank, [&] { comm_->drop(rank, "enough"); });
    is_spoiled_ |= was_live;
    require(!was_live || peer->fake->is_told(), "who is dropped is told");
  }

  void recover(uint32_t rank) {
    give_up(rank, [&] { comm_->recover(rank); });
  }

  // Every life of that rank that is gone.
  template <class Call>
  void give_up(uint32_t rank, const Call& call) {
    const bool is_known = peers_.newest(rank) != nullptr;
    try {
      call();
      require(is_known, "only who was there can be given up");
    } catch (const Error& error) {
      return require(!is_known && error.kind() == Failure::kArgument, "who was there can be given up");
    }
    for (Peer& peer : peers_) {
      if (peer.fake->rank() != rank || peer.is_live) continue;
      peer.is_given_up = true;
      for (Box& box : peer.boxes) box.is_pending = box.is_doubtful = false;
    }
    peers_.close_gone(layout_);
  }

  // Whatever came before: who is still there is served, and then all is as at the start.
  void settle() {
    Bytes nothing(nullptr, 0);
    for (uint32_t i = 0; true; ++i) {
      for (const Peer& peer : peers_) {
        if (peers_.is_lost(peer)) recover(peer.fake->rank());
      }
      if (!receive(Wanted{})) break;
      require(i < kMostLinks * kSlots * 4, "receiving comes to an end");
    }
    while (!batches_.empty()) answer(nothing);
    if (is_spoiled_) receive(Wanted{});  // a life whose index goes back after that of an older one
    for (const Peer& peer : peers_) {
      require(!is_spoiled_ || may_keep_index(peer) || !has_index(peer), "whom nobody holds gives its index back");
    }
    for (const Peer& peer : peers_) is_spoiled_ |= peer.boxes[layout_.retry_slot()].is_pending;
    for (const Peer& peer : peers_) {
      if (is_spoiled_) continue;
      for (uint32_t slot = 0; slot < kSlots; ++slot) {
        require(peer.boxes[slot].accepted == peer.boxes[slot].replied, "everything is answered in the end");
      }
      std::memset(peer.fake->meta() + layout_.dispatch_meta.headers_offset, 0,
                  layout_.dispatch_meta.object_bytes - layout_.dispatch_meta.headers_offset);
    }
  }

  const Shape shape_;
  const uint32_t first_seq_;
  Layout layout_{};
  std::shared_ptr<ExpertComm> comm_;
  std::vector<std::unique_ptr<Desk>> desks_;
  Peers peers_;
  std::vector<std::shared_ptr<Batch>> batches_;
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
