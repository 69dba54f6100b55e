// SPDX-License-Identifier: Apache-2.0
// The text that goes over a control connection: why a link is dropped.
#include "transport/control.h"

namespace m2n {
namespace {

// How many bytes the character at `at` takes in UTF-8; 0: it is none, or one that controls a terminal.
size_t bytes_of_character(const unsigned char* at, const unsigned char* end) {
  if (*at < 0x80) return *at >= 0x20 && *at != 0x7F ? 1 : 0;
  const size_t num_bytes = *at >= 0xF0 ? 4 : *at >= 0xE0 ? 3 : *at >= 0xC0 ? 2 : 0;
  if (num_bytes == 0 || *at > 0xF4 || static_cast<size_t>(end - at) < num_bytes) return 0;
  uint32_t code = *at & (0x7Fu >> num_bytes);
  for (size_t i = 1; i < num_bytes; ++i) {
    if ((at[i] & 0xC0) != 0x80) return 0;
    code = code << 6 | (at[i] & 0x3Fu);
  }
  constexpr uint32_t kLeast[] = {0, 0, 0xA0, 0x800, 0x10000};  // of so many bytes; below 0xA0 are controls
  const bool is_surrogate = code >= 0xD800 && code < 0xE000;
  const bool changes_lines = code == 0x2028 || code == 0x2029;
  const bool changes_direction = (code >= 0x202A && code <= 0x202E) || (code >= 0x2066 && code <= 0x2069);
  const bool is_fine = code >= kLeast[num_bytes] && code < 0x110000 && !is_surrogate;
  return is_fine && !changes_lines && !changes_direction ? num_bytes : 0;
}

}  // namespace

std::string printable(const char* bytes, size_t num_bytes) {
  std::string text;
  const auto* at = reinterpret_cast<const unsigned char*>(bytes);
  const unsigned char* end = at + num_bytes;
  while (at < end) {
    const size_t length = bytes_of_character(at, end);
    if (length == 0) {
      text += '?';
      ++at;
    } else {
      text.append(reinterpret_cast<const char*>(at), length);
      at += length;
    }
  }
  return text;
}

std::string pack_drop(const std::string& reason) {
  size_t length = reason.size();
  if (length > kMostReasonBytes) {
    length = kMostReasonBytes;
    while ((static_cast<unsigned char>(reason[length]) & 0xC0) == 0x80) --length;  // not within a character
  }
  const auto short_length = static_cast<uint16_t>(length);
  std::string message(kDropHeadBytes, kDrop);
  std::memcpy(message.data() + 1, &short_length, sizeof short_length);
  return message.append(reason, 0, length);
}

}  // namespace m2n
