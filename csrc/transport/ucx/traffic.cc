// SPDX-License-Identifier: Apache-2.0
// Messages over the links: what was put goes out as one active message or as puts, and what arrives goes from UCX
// straight into the windows.
#include <sched.h>

#include <algorithm>
#include <cstring>

#include "core/atomic.h"
#include "core/error.h"
#include "transport/host_exec.h"
#include "transport/ucx/links.h"

namespace m2n::ucx {
namespace {

// For the network to take a message of a caller that waits for that, where UCX does not copy.
constexpr int64_t kTakenNs = 30'000'000'000;
// Up to here to copy takes less time than to wait for memory that need not be copied.
constexpr uint64_t kShortBytes = 16 << 10;
// From here on UCX waits for the receiver before it reads anything.
constexpr uint64_t kMostWaitedBytes = 500 << 10;
constexpr int kLooks = 8;  // of one call, while each finds something, but no whole message

}  // namespace

void Links::send(const std::vector<Piece>& pieces, const Signal* word, Signal value, bool is_free_after) {
  std::lock_guard lock(mutex_);
  Link* link = find(areas_.place_of(word).peer_idx);
  // To a peer that is gone nothing is sent; its state says so.
  if (is_closed_ || link == nullptr || link->endpoint == nullptr || link->is_broken) return;
  if (link->is_put) {
    post_puts(*link, pieces, word, value, is_free_after);
  } else {
    post_message(*link, pieces, word, value, is_free_after);
  }
}

void Links::write_message(Sending& sending, const std::vector<Piece>& pieces) {
  MessageHead head{sending.link->peer_key, sending.link->peer_link, 0, 0, areas_.place_of(sending.word).offset,
                   sending.value};
  MessagePart parts[kMaxParts];
  unsigned char inline_bytes[kMaxInlineBytes];
  uint64_t num_inline_bytes = 0;
  sending.iov.clear();
  const auto add = [&](const Piece& piece) {
    areas_.add_part(head, parts, head.num_inline, piece.to, piece.num_bytes);
  };
  // What goes beside the rows travels in the header where it is short, so that the data is rows alone.
  const auto is_inline = [&](const Piece& piece) {
    return areas_.place_of(piece.to).area != 0 && piece.num_bytes <= max_inline_bytes_ / kMaxParts;
  };
  for (const Piece& piece : pieces) {
    if (!is_inline(piece)) continue;
    std::memcpy(inline_bytes + num_inline_bytes, piece.from, piece.num_bytes);
    num_inline_bytes += piece.num_bytes;
    add(piece);
    head.num_inline = head.num_parts;
  }
  for (const Piece& piece : pieces) {
    if (is_inline(piece)) continue;
    add(piece);
    sending.iov.push_back({const_cast<unsigned char*>(piece.from), piece.num_bytes});
  }
  const size_t parts_bytes = head.num_parts * sizeof(MessagePart);
  sending.header.resize(sizeof head + parts_bytes + num_inline_bytes);
  std::memcpy(sending.header.data(), &head, sizeof head);
  std::memcpy(sending.header.data() + sizeof head, parts, parts_bytes);
  std::memcpy(sending.header.data() + sizeof head + parts_bytes, inline_bytes, num_inline_bytes);
}

Request Links::post(Sending& sending, uint32_t flags) {
  RequestParam param;
  param.field_mask = RequestParam::kCallback | RequestParam::kUserData | RequestParam::kDatatype | flags;
  param.callback.send = &on_sent;
  param.user_data = &sending;
  const bool is_run = sending.iov.size() <= 1;
  param.datatype = is_run ? RequestParam::kBytes : RequestParam::kIov;
  const Iov run = sending.iov.empty() ? Iov{nullptr, 0} : sending.iov[0];
  return api_.am_send_nbx(sending.link->endpoint, 0, sending.header.data(), sending.header.size(),
                          is_run ? run.buffer : sending.iov.data(), is_run ? run.length : sending.iov.size(), &param);
}

void Links::post_message(Link& link, const std::vector<Piece>& pieces, const Signal* word, Signal value,
                         bool is_free_after) {
  Sending& sending = keep(link, word);
  sending.value = value;
  write_message(sending, pieces);
  const uint64_t num_bytes = bytes_of(pieces);
  const bool is_short = num_bytes <= kShortBytes;
  const bool may_wait = !is_short && num_bytes <= kMostWaitedBytes && sending.iov.size() <= 1;
  if (is_free_after && may_wait && link.was_heard) {
    // Straight from the caller's rows: the network takes them at once, and UCX copies what is left. It would have to
    // wait for a peer that has not taken the last message; one that was heard since then runs.
    link.was_heard = false;
    note_request(sending, post(sending, RequestParam::kFastCompletion));
    if (!progress_until([&] { return sending.num_requests == 1 || link.is_broken; }, kTakenNs)) mark_broken(link, "");
    return end_request(sending, Status::kOk);
  }
  if (is_free_after) {
    std::vector<Piece> own = pieces;
    copy_to_area(own);
    write_message(sending, own);
  }
  note_request(sending, post(sending, is_short ? RequestParam::kFastCompletion : 0));
  end_request(sending, Status::kOk);
}

void Links::copy_to_area(std::vector<Piece>& pieces) {
  for (Piece& piece : pieces) {
    if (piece.from != piece.to) std::memcpy(piece.to, piece.from, piece.num_bytes);
    piece.from = piece.to;
  }
}

void Links::post_puts(Link& link, const std::vector<Piece>& pieces, const Signal* word, Signal value,
                      bool is_free_after) {
  Sending& sending = keep(link, word);
  sending.value = value;
  const auto put = [&](const void* from, uint64_t num_bytes, const void* to) {
    RequestParam param;
    param.field_mask = RequestParam::kCallback | RequestParam::kUserData;
    param.callback.send = &on_sent;
    param.user_data = &sending;
    const SendAreas::Place place = areas_.place_of(to);
    note_request(sending, api_.put_nbx(link.endpoint, from, num_bytes, link.remote[place.area] + place.offset,
                                       link.remote_keys[place.area], &param));
  };
  std::vector<Piece> own = pieces;
  if (is_free_after) copy_to_area(own);
  for (const Piece& piece : own) put(piece.from, piece.num_bytes, piece.to);
  // It may make progress, and so may complete those.
  if (api_.worker_fence(worker_) != Status::kOk) mark_broken(link, "");
  if (!link.is_broken) put(&sending.value, sizeof sending.value, word);
  end_request(sending, Status::kOk);
}

Links::Sending& Links::keep(Link& link, const Signal* word) {
  // Used again for the sake of its memory.
  if (idle_.empty()) idle_.push_back(std::make_unique<Sending>());
  sending_.push_back(std::move(idle_.back()));
  idle_.pop_back();
  Sending& sending = *sending_.back();
  sending.link = &link;
  sending.word = word;
  sending.num_requests = 1;  // of the caller, which ends it when it has posted all
  ++link.num_sending;
  store_release(&num_sending_, num_sending_ + 1);  // SYNC: network-sending
  return sending;
}

void Links::note_request(Sending& sending, Request request) {
  if (is_error(request)) return mark_broken(*sending.link, "");
  if (request != nullptr) ++sending.num_requests;
}

void Links::on_sent(void* request, Status status, void* user_data) {
  auto& sending = *static_cast<Sending*>(user_data);
  Links& links = *sending.link->links;
  links.api_.request_free(request);
  links.end_request(sending, status);
}

void Links::end_request(Sending& sending, Status status) {
  Link& link = *sending.link;
  if (status != Status::kOk) mark_broken(link, "");
  if (--sending.num_requests != 0) return;
  --link.num_sending;
  const auto at =
      std::find_if(sending_.begin(), sending_.end(), [&](const auto& one) { return one.get() == &sending; });
  idle_.push_back(std::move(*at));
  sending_.erase(at);
  store_release(&num_sending_, num_sending_ - 1);  // SYNC: network-sending
}

void Links::finish(const Signal* word) {
  const int64_t until_ns = now_ns() + kFinishNs;
  while (num_sending() != 0) {
    std::lock_guard lock(mutex_);
    const auto is_it = [word](const auto& one) { return one->word == word; };
    const auto found = std::find_if(sending_.begin(), sending_.end(), is_it);
    if (is_closed_ || found == sending_.end()) return;
    if (now_ns() > until_ns) return mark_broken(*(*found)->link, "");
    if (api_.worker_progress(worker_) == 0) sched_yield();
  }
}

Status Links::on_message(void* arg, const void* header, size_t header_bytes, void* data, size_t num_bytes,
                         const AmReceived* received) {
  return static_cast<Links*>(arg)->receive(header, header_bytes, data, num_bytes, *received);
}

Status Links::receive(const void* header, size_t header_bytes, void* data, size_t num_bytes,
                      const AmReceived& received) {
  MessageHead head{};
  if (!read_head(header, header_bytes, &head)) return Status::kOk;
  Link* link = find(head.link);
  // Nobody's: a stranger's, or that of a link which has ended.
  if (link == nullptr || link->key != head.key || link->is_ended) return Status::kOk;
  link->was_heard = true;
  Message message;
  const std::string wrong =
      read_message(header, header_bytes, num_bytes, {link->own.rows_bytes, link->own.meta_bytes}, &message);
  if (!wrong.empty()) {
    mark_broken(*link, "it sent a message with " + wrong);
    return Status::kOk;
  }
  if (areas_.has_rows_apart()) {  // rows here are no memory of the host either
    mark_broken(*link, "it sent a message where all must be put");
    return Status::kOk;
  }
  std::vector<Iov> places;  // of the data
  const unsigned char* inline_bytes = message.inline_bytes;
  for (uint32_t i = 0; i < head.num_parts; ++i) {
    const MessagePart& part = message.parts[i];
    unsigned char* to = data_of(link->own, part.area) + part.offset;
    if (i < head.num_inline) {
      std::memcpy(to, inline_bytes, part.num_bytes);
      inline_bytes += part.num_bytes;
    } else {
      places.push_back({to, part.num_bytes});
    }
  }
  if ((received.attributes & AmReceived::kIsRendezvous) != 0) return fetch(*link, head, std::move(places), data);
  // It came as a whole, and lies in memory of UCX until this returns.
  const auto* from = static_cast<const unsigned char*>(data);
  for (const Iov& place : places) {
    std::memcpy(place.buffer, from, place.length);
    from += place.length;
  }
  deliver(*link, head);
  return Status::kOk;
}

Status Links::fetch(Link& link, const MessageHead& head, std::vector<Iov> places, void* data) {
  auto receiving = std::make_unique<Receiving>(Receiving{&link, head, std::move(places)});
  const std::vector<Iov>& iov = receiving->iov;
  RequestParam param;
  param.field_mask = RequestParam::kCallback | RequestParam::kUserData | RequestParam::kDatatype;
  param.callback.receive = &on_received;
  param.user_data = receiving.get();
  const bool is_run = iov.size() == 1;
  param.datatype = is_run ? RequestParam::kBytes : RequestParam::kIov;
  void* to = is_run ? iov[0].buffer : const_cast<Iov*>(iov.data());
  const Request request = api_.am_recv_data_nbx(worker_, data, to, is_run ? iov[0].length : iov.size(), &param);
  if (is_error(request)) {
    mark_broken(link, "");
  } else if (request == nullptr) {
    deliver(link, head);
  } else {
    ++link.num_receiving;
    receiving.release();  // on_received() takes it
  }
  return Status::kInProgress;
}

void Links::on_received(void* request, Status status, size_t, void* user_data) {
  const std::unique_ptr<Receiving> receiving(static_cast<Receiving*>(user_data));
  Link& link = *receiving->link;
  link.links->api_.request_free(request);
  --link.num_receiving;
  if (status != Status::kOk) return link.links->mark_broken(link, "");
  if (!link.is_ended) link.links->deliver(link, receiving->head);
}

void Links::deliver(Link& link, const MessageHead& head) {
  store_signal(reinterpret_cast<Signal*>(link.own.meta + head.word_offset), head.value);  // SYNC: slot-signal
  has_delivered_ = true;
  on_signal_();
}

void Links::on_error(void* arg, Endpoint*, Status) {
  auto& link = *static_cast<Link*>(arg);
  link.links->mark_broken(link, "");
}

void Links::look() {
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock() || is_closed_) return;
  // Whoever looks wants to know at once of a message that has come: one more call of UCX is a system call.
  has_delivered_ = false;
  for (int i = 0; i < kLooks && !has_delivered_ && api_.worker_progress(worker_) != 0; ++i) {
  }
}

bool Links::settle_and_arm() {
  std::lock_guard lock(mutex_);
  if (is_closed_) return true;
  while (api_.worker_progress(worker_) != 0) {
  }
  return api_.worker_arm(worker_) == Status::kOk;
}

}  // namespace m2n::ucx
