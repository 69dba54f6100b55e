// SPDX-License-Identifier: Apache-2.0
// Messages to a peer whose memory cannot be written from here. Its view points into a send area of the same layout;
// what is put there is noted in an OutgoingMessage, and signal() sends it. So the bodies of verbs are the same.
#pragma once

#include <cstdint>
#include <vector>

#include "core/slot.h"

namespace m2n {

// Bytes for a peer, at an address of the send area that stands for its memory. `from` == `to`: they lie there already.
struct Piece {
  unsigned char* to;
  const unsigned char* from;
  uint64_t num_bytes;
};

// What carries the messages of a rank. The address of a word in a send area tells which peer is meant.
class Wire {
 public:
  virtual ~Wire() = default;
  // Is this an address of the send area? Others are of peers whose memory can be written.
  virtual bool covers(const void* at) const = 0;
  // Whoever sees `value` in the peer's word that `word` stands for sees also the pieces. `is_free_after`: what they are
  // put from is no longer read when this returns.
  virtual void send(const std::vector<Piece>& pieces, const Signal* word, Signal value, bool is_free_after) = 0;
  // Returns when nothing reads any more what was sent with this word; the peer has it, or is gone.
  virtual void finish(const Signal* word) = 0;
};

// One message as it is being written, by one thread. What it is put from must stay as it is until finish(), or
// (`is_free_after`) until send() has returned.
class OutgoingMessage {
 public:
  OutgoingMessage(Wire& wire, bool is_free_after) : wire_(wire), is_free_after_(is_free_after) {}

  bool covers(const void* at) const { return wire_.covers(at); }
  void put(void* to, const void* from, uint64_t num_bytes) {
    add({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), num_bytes});
  }
  void send(const Signal* word, Signal value) {
    wire_.send(pieces_, word, value, is_free_after_);
    pieces_.clear();
  }
  void finish(const Signal* word) { wire_.finish(word); }

 private:
  // Neighbours on both sides become one; also where two kinds of pieces come in turn.
  void add(const Piece& piece) {
    if (piece.num_bytes == 0) return;
    for (size_t back = 1; back <= 2 && back <= pieces_.size(); ++back) {
      Piece& last = pieces_[pieces_.size() - back];
      if (last.to + last.num_bytes != piece.to || last.from + last.num_bytes != piece.from) continue;
      last.num_bytes += piece.num_bytes;
      return;
    }
    pieces_.push_back(piece);
  }

  Wire& wire_;
  bool is_free_after_;
  std::vector<Piece> pieces_;
};

}  // namespace m2n
