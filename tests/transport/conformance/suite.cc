// SPDX-License-Identifier: Apache-2.0
// What every transport owes to those who use it, a sentence each. Usage: conformance NAME, as read_choice() reads it.
// A line for each sentence; 1 where one does not hold.
#include <sys/resource.h>

#include <cstdio>
#include <cstring>
#include <thread>

#include "conformance/ranks.h"
#include "transport/choice.h"

namespace m2n::conformance {
namespace {

std::vector<unsigned char> pattern(uint64_t num_bytes, uint64_t seed) {
  std::vector<unsigned char> bytes(num_bytes);
  for (uint64_t i = 0; i < num_bytes; ++i) bytes[i] = static_cast<unsigned char>((i * 31 + seed * 17) % 251 + 1);
  return bytes;
}

// Calls it; what it was refused with.
template <class Call>
std::string refusal(Call&& call) {
  try {
    call();
    return "";
  } catch (const Error& error) {
    require(error.kind() == Failure::kSetup || error.kind() == Failure::kArgument, "a refusal is an error of set-up");
    const std::string text = error.what();
    require(!text.empty() && text.find('\n') == std::string::npos, "a refusal is one line");
    return text;
  }
}

void exchange(Rank& writer, Rank& owner, Signal value, uint64_t num_bytes) {
  const std::vector<unsigned char> sent = pattern(num_bytes, value);
  writer.send(sent, value);
  require(owner.receive(value), "the signal comes");
  require(std::memcmp(owner.rows_of(), sent.data(), sent.size()) == 0, "what was put before it is there");
}

// put, drain, signal

void what_was_put_before_a_signal_is_there_with_it(const Make& make) {
  Pair pair(make);
  const uint64_t sizes[] = {1, 8, 100, 4096, 4097, pair.owner.object_bytes};
  for (Signal value = 1; value <= 60; ++value) {
    exchange(pair.writer, pair.owner, value, sizes[value % std::size(sizes)]);
    exchange(pair.owner, pair.writer, value, sizes[(value + 3) % std::size(sizes)]);
  }
}

void rows_are_the_callers_again_when_send_returns(const Make& make) {
  Pair pair(make);
  std::vector<unsigned char> bytes = pattern(pair.owner.object_bytes, 1);
  const std::vector<unsigned char> sent = bytes;
  pair.writer.send(bytes, 1);
  std::fill(bytes.begin(), bytes.end(), 0);
  require(pair.owner.receive(1), "the signal comes");
  require(std::memcmp(pair.owner.rows_of(), sent.data(), sent.size()) == 0, "what was sent is what was there then");
}

void a_peer_writes_into_its_own_objects_alone(const Make& make) {
  Pair pair(make);
  Rank& owner = pair.owner;
  owner.rows->add_object(kPeer + 1);
  pair.writer.send(std::vector<unsigned char>(owner.object_bytes, 0xFF), 1);
  require(owner.receive(1), "the signal comes");
  require(sum(owner.rows_of(), owner.object_bytes) == 0xFF * owner.object_bytes, "its object is full");
  require(sum(owner.rows->data(), kPeer * owner.stride_bytes) == 0, "what lies in front of it is as it was");
  const unsigned char* behind = owner.rows_of() + owner.object_bytes;
  require(sum(behind, static_cast<uint64_t>(owner.rows->data() + owner.rows->bytes() - behind)) == 0,
          "so is what lies behind it");
}

// wake

void a_signal_wakes_who_sleeps(const Make& make) {
  Pair pair(make);
  // Between two of its looks a sleeper is none for a moment: so once in several times is enough.
  for (Signal value = 1; value <= 5; ++value) {
    bool is_ready = false;
    std::thread sleeper([&] { is_ready = pair.owner.receive(value); });
    await([&] { return load_seq_cst(&pair.owner.wake.waiters) != 0; }, "who waits falls asleep");
    pair.writer.send(pattern(8, value), value);
    sleeper.join();
    require(is_ready, "the signal comes");
  }
  const bool is_woken = load_seq_cst(&pair.owner.wake.events) != 0;
  require(is_woken || !pair.owner.is_woken, "a sleeper was woken, and did not find it by itself");
}

// loss

void what_was_sent_before_the_end_counts(const Make& make) {
  Pair pair(make);
  Rank &writer = pair.writer, &owner = pair.owner;
  writer.send(pattern(4096, 7), 7);
  if (writer.relay != nullptr) writer.relay->drain();
  if (writer.network != nullptr) {
    writer.network->drain();
    writer.network->close();
    owner.network->end(kPeer);
    await([&] { return owner.is_ended.load(); }, "the end is told");
  }
  writer.mappings.clear();
  require(load_signal(owner.word()) == 7, "the last signal is there");
  require(std::memcmp(owner.rows_of(), pattern(4096, 7).data(), 4096) == 0, "and its rows");
}

void who_sends_to_a_peer_that_is_gone_neither_faults_nor_hangs(const Make& make) {
  WakeWord wake{};
  Rank writer(make);
  writer.require_host();
  auto owner = std::make_unique<Rank>(make);
  if (writer.network == nullptr) {
    if (!refusal([&] { writer.attach(owner->add_objects(), elsewhere(*owner), &wake); }).empty()) {
      throw NotHere("it reaches its own process alone");
    }
    owner.reset();
    return writer.send(pattern(4096, 1), 1);
  }
  link(writer, *owner);
  owner.reset();
  for (Signal value = 1; value <= 3; ++value) writer.send(pattern(4096, value), value);
  writer.network->end(kPeer);
  await([&] { return writer.is_ended.load(); }, "the end is told");
  require(!writer.is_violated, "to leave is no violation");
  writer.send(pattern(4096, 4), 4);
  await([&] { return writer.network->release(kPeer); }, "the index comes back");
}

// late signals

void a_late_signal_is_stored_once_and_a_forgotten_one_never(const Make& make) {
  Pair pair(make);
  Rank &writer = pair.writer, &owner = pair.owner;
  if (writer.relay == nullptr) throw NotHere("it holds no signals back");
  writer.send(pattern(8, 1), 1);
  require(std::memcmp(owner.rows_of(), pattern(8, 1).data(), 8) == 0, "rows are not late");
  writer.relay->drain();
  require(load_signal(owner.word()) == 1, "after drain() the signal is there");
  require(writer.relay->held().count == 1 && writer.relay->held().total_ns > 0, "it was counted");
  writer.send(pattern(8, 2), 2);
  writer.relay->forget(writer.view.meta, writer.object_bytes);
  writer.relay->drain();
  require(load_signal(owner.word()) == 1 && writer.relay->held().count == 1, "a forgotten one is not stored");
}

// shortage

void memory_that_is_not_there_is_refused(const Make& make) {
  const auto transport = make();
  if (!transport->origin().device.empty()) throw NotHere("the memory of a device is its driver's to refuse");
  const uint64_t much = uint64_t{1} << 46;
  require(!refusal([&] { transport->make_window(much, much, 1)->add_object(0); }).empty(), "64 TiB are refused");
}

void without_descriptors_an_object_is_refused_and_made_later(const Make& make) {
  Rank rank(make);
  rlimit limit{};
  require(getrlimit(RLIMIT_NOFILE, &limit) == 0, "the limit of descriptors");
  const rlimit none{0, limit.rlim_max};
  require(setrlimit(RLIMIT_NOFILE, &none) == 0, "no descriptors are left");
  const std::string text = refusal([&] { rank.rows->add_object(kPeer); });
  require(setrlimit(RLIMIT_NOFILE, &limit) == 0, "they are there again");
  if (text.empty()) throw NotHere("its objects need no descriptors");
  require(rank.rows->add_object(kPeer).bytes == rank.object_bytes, "then the object is made");
}

// objects, handles, indices

void objects_and_holes_begin_as_zeros(const Make& make) {
  Rank rank(make);
  rank.require_host();
  (void)rank.add_objects();
  rank.meta->set_word(kPeer * rank.stride_bytes + 8, 0x0102);
  require(sum(rank.rows->data(), rank.rows->bytes()) == 0, "all of a window reads as zeros");
  require(sum(rank.meta->data(), rank.meta->bytes()) == 3, "but for a word that was set");
}

void a_window_has_room_for_its_peers_alone(const Make& make) {
  Rank rank(make);
  require(rank.rows->bytes() == kMaxPeers * rank.stride_bytes, "an object for each of them, at the stride");
  require(!refusal([&] { rank.rows->add_object(kMaxPeers); }).empty(), "one more is refused");
}

void a_handle_of_another_size_is_refused(const Make& make) {
  Rank maker(make), other(make);
  std::vector<Handle> handles = maker.add_objects();
  handles[0].bytes *= 2;
  require(!refusal([&] { other.transport->attach(std::move(handles[0]), elsewhere(maker)); }).empty(),
          "a peer that lays its memory out in another way is not attached");
}

void an_object_that_nobody_has_is_given_back(const Make& make) {
  Rank owner(make), writer(make);
  if (owner.network != nullptr) throw NotHere("nobody attaches its objects");
  writer.attach(owner.add_objects(), owner.transport->origin(), &owner.wake);
  require(!owner.rows->remove_object(kPeer), "who shares the mapping keeps the object");
  if (owner.is_on_host()) std::memset(writer.view.rows, 0xFF, owner.object_bytes);
  writer.mappings.clear();
  require(owner.rows->remove_object(kPeer) && owner.rows->remove_object(kPeer), "then it goes, once");
  require(!owner.is_on_host() || sum(owner.rows->data(), owner.rows->bytes()) == 0, "and leaves a hole");
}

void late_writes_of_an_old_link_land_where_nobody_reads(const Make& make) {
  Rank owner(make), writer(make);
  owner.require_host();
  if (owner.network != nullptr) throw NotHere("nobody attaches its objects");
  WakeWord wake{};
  if (!refusal([&] { writer.attach(owner.add_objects(), elsewhere(owner), &wake); }).empty()) {
    throw NotHere("it reaches its own process alone");
  }
  require(owner.rows->remove_object(kPeer), "an object that another process has is given back at once");
  (void)owner.rows->add_object(kPeer);
  std::memset(writer.view.rows, 0xFF, owner.object_bytes);
  require(sum(owner.rows->data(), owner.rows->bytes()) == 0, "the next object is another one");
}

void an_index_serves_one_link_after_another(const Make& make) {
  Pair pair(make);
  Rank* ranks[] = {&pair.writer, &pair.owner};
  for (Signal round = 1; round <= 3; ++round) {
    exchange(pair.writer, pair.owner, round, 4096);
    for (Rank* rank : ranks) {
      rank->exposed.reset();
      rank->mappings.clear();
      if (rank->network != nullptr) rank->network->end_now(kPeer);
    }
    for (Rank* rank : ranks) {
      if (rank->network != nullptr) await([&] { return rank->network->release(kPeer); }, "the index comes back");
      require(rank->rows->remove_object(kPeer) && rank->meta->remove_object(kPeer), "its memory is given back");
    }
    link(pair.writer, pair.owner);
    require(load_signal(pair.owner.word()) == 0, "the next link begins with zeros");
  }
}

void an_address_that_is_none_is_refused(const Make& make) {
  Rank one(make), other(make);
  if (one.network == nullptr) throw NotHere("its peers need no address");
  (void)one.address();
  std::string address = other.address();
  for (const std::string& bad : {std::string(), std::string(address.size(), 'x'), address.substr(1)}) {
    require(!refusal([&] { one.connect(bad, Fd()); }).empty(), "bytes that are no address are refused");
  }
  await([&] { return one.network->release(kPeer); }, "the index comes back");
}

struct Sentence {
  const char* name;
  void (*check)(const Make& make);
};
#define M2N_SENTENCE(name) {#name, name}
constexpr Sentence kSentences[] = {
    M2N_SENTENCE(what_was_put_before_a_signal_is_there_with_it),
    M2N_SENTENCE(rows_are_the_callers_again_when_send_returns),
    M2N_SENTENCE(a_peer_writes_into_its_own_objects_alone),
    M2N_SENTENCE(a_signal_wakes_who_sleeps),
    M2N_SENTENCE(what_was_sent_before_the_end_counts),
    M2N_SENTENCE(who_sends_to_a_peer_that_is_gone_neither_faults_nor_hangs),
    M2N_SENTENCE(a_late_signal_is_stored_once_and_a_forgotten_one_never),
    M2N_SENTENCE(memory_that_is_not_there_is_refused),
    M2N_SENTENCE(without_descriptors_an_object_is_refused_and_made_later),
    M2N_SENTENCE(objects_and_holes_begin_as_zeros),
    M2N_SENTENCE(a_window_has_room_for_its_peers_alone),
    M2N_SENTENCE(a_handle_of_another_size_is_refused),
    M2N_SENTENCE(an_object_that_nobody_has_is_given_back),
    M2N_SENTENCE(late_writes_of_an_old_link_land_where_nobody_reads),
    M2N_SENTENCE(an_index_serves_one_link_after_another),
    M2N_SENTENCE(an_address_that_is_none_is_refused),
};

}  // namespace
}  // namespace m2n::conformance

int main(int, char** arguments) {
  using namespace m2n::conformance;
  const std::string name = arguments[1];
  int num_wrong = 0;
  for (const Sentence& sentence : kSentences) {
    try {
      sentence.check([&] { return m2n::make_transport(name); });
      std::printf("holds     %s\n", sentence.name);
    } catch (const NotHere& why) {
      std::printf("not here  %s: %s\n", sentence.name, why.what());
    } catch (const std::exception& error) {
      std::printf("WRONG     %s: %s\n", sentence.name, error.what());
      ++num_wrong;
    }
    std::fflush(stdout);
  }
  return num_wrong == 0 ? 0 : 1;
}
