// SPDX-License-Identifier: Apache-2.0
// Headers of messages and addresses as no honest peer writes them: whatever is accepted lies within the objects.
// Usage: network_messages SEED ROUNDS. Under AddressSanitizer and UndefinedBehaviorSanitizer.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "transport/network/message.h"
#include "transport/ucx/link_address.h"

namespace {

using namespace m2n;
using namespace m2n::ucx;

constexpr uint64_t kAreaBytes[kNumAreas] = {1 << 16, 1 << 12};
std::mt19937_64 g_random;
long g_accepted = 0;

void require(bool is_so, const char* what) {
  if (is_so) return;
  std::printf("%s\n", what);
  std::exit(1);
}

uint64_t pick(std::initializer_list<uint64_t> values) { return values.begin()[g_random() % values.size()]; }

// Bytes on the heap, of exactly that size: a read behind them is seen.
struct Bytes {
  explicit Bytes(size_t count) : data(new unsigned char[count]), size(count) {}
  std::unique_ptr<unsigned char[]> data;
  size_t size;
};

uint64_t odd_number() {
  const uint64_t near = pick({0, kAreaBytes[0], kAreaBytes[1], 1ull << 32, 1ull << 63, ~0ull, 64, 4096});
  return near + pick({0, 1, 8, ~0ull, ~7ull, g_random() % 128});
}

void read_one_header() {
  MessageHead head{};
  head.num_parts = static_cast<uint16_t>(pick({0, 1, 2, 3, kMaxParts, kMaxParts + 1, 0xFFFF}));
  head.num_inline = static_cast<uint16_t>(pick({0, 1, 2, head.num_parts, 0xFFFFu}));
  head.word_offset = pick({0, 8, 12, kAreaBytes[1] - 8, kAreaBytes[1] - 4, kAreaBytes[1], odd_number()});
  MessagePart parts[kMaxParts + 1] = {};
  uint64_t num_bytes[2] = {0, 0};
  const uint32_t num_parts = std::min<uint32_t>(head.num_parts, kMaxParts + 1);
  for (uint32_t i = 0; i < num_parts; ++i) {
    parts[i].area = static_cast<uint32_t>(pick({0, 0, 1, 1, 1, 2, ~0ull}));
    parts[i].offset = pick({0, 64, 1024, odd_number()});
    parts[i].num_bytes = pick({0, 8, 64, 512, odd_number()});
    num_bytes[i < head.num_inline] += parts[i].num_bytes;
  }
  const size_t whole = sizeof head + num_parts * sizeof(MessagePart) + (num_bytes[1] < 65536 ? num_bytes[1] : 0);
  Bytes header(pick({whole, whole, whole, whole, whole - 1, whole + 1, 0, sizeof head, g_random() % 300}));
  std::memcpy(header.data.get(), &head, std::min(header.size, sizeof head));
  if (header.size > sizeof head) {
    const size_t room = header.size - sizeof head;
    std::memcpy(header.data.get() + sizeof head, parts, std::min(room, num_parts * sizeof(MessagePart)));
  }
  const size_t data_bytes = pick({num_bytes[0], num_bytes[0], num_bytes[0], num_bytes[0] + 1, 0});
  Message message;
  if (!read_message(header.data.get(), header.size, data_bytes, kAreaBytes, &message).empty()) return;
  ++g_accepted;
  uint64_t num_data = 0, num_inline = 0;
  require(message.head.num_parts <= kMaxParts, "too many parts");
  for (uint32_t i = 0; i < message.head.num_parts; ++i) {
    const MessagePart& part = message.parts[i];
    require(part.area < kNumAreas && part.offset <= kAreaBytes[part.area] &&
                part.num_bytes <= kAreaBytes[part.area] - part.offset,
            "a part outside its object");
    (i < message.head.num_inline ? num_inline : num_data) += part.num_bytes;
  }
  require(num_data == data_bytes, "data of another length");
  const auto* end = header.data.get() + header.size;
  require(message.inline_bytes + num_inline == end, "bytes outside the header");
  require(message.head.word_offset % 8 == 0 && message.head.word_offset <= kAreaBytes[1] - 8, "a signal outside");
}

void read_one_door() {
  LinkAddress address;
  address.link = 7;
  address.key = g_random();
  address.worker = std::string(g_random() % 100, 'a');
  for (LinkAddress::Object& object : address.objects) object = {g_random(), std::string(g_random() % 50, 'k')};
  std::string bytes = write_address(address);
  LinkAddress again;
  require(read_address(bytes, &again) && again.key == address.key && again.worker == address.worker &&
              again.objects[1].key == address.objects[1].key,
          "an address that reads otherwise");
  for (int i = 0; i < 3; ++i) bytes[g_random() % bytes.size()] = static_cast<char>(g_random());
  bytes.resize(g_random() % (bytes.size() + 10));
  if (!read_address(bytes, &again)) return;
  size_t total = again.worker.size();
  for (const LinkAddress::Object& object : again.objects) total += object.key.size();
  require(total <= bytes.size(), "an address longer than its bytes");
}

}  // namespace

int main(int, char** arguments) {
  g_random.seed(std::strtoull(arguments[1], nullptr, 10));
  const long rounds = std::atol(arguments[2]);
  for (long i = 0; i < rounds; ++i) {
    read_one_header();
    read_one_door();
  }
  require(g_accepted > rounds / 100, "hardly any header is good: the rest says little");
  std::printf("%ld headers and addresses, %ld headers good\n", rounds, g_accepted);
}
