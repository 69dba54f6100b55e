// SPDX-License-Identifier: Apache-2.0
// Finds the memory cgroups by /proc/self: `cgroup` has this process's path in each hierarchy, `mountinfo` where a
// hierarchy is mounted, and which part of it (in a container often the container's own).
#include "transport/memory_limit.h"

#include <sys/resource.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <iterator>
#include <optional>
#include <sstream>
#include <vector>

#include "core/error.h"

namespace m2n {
namespace {

// Of one hierarchy: the names of its files, and of the numbers in memory.stat for pages that can be given back. In v1
// the plain ones leave out the cgroups below.
struct Version {
  const char* file_system;
  const char* limit;
  const char* held;
  const char* reclaimable[2];
};
constexpr Version kVersions[] = {
    {"cgroup", "memory.limit_in_bytes", "memory.usage_in_bytes", {"total_active_file", "total_inactive_file"}},
    {"cgroup2", "memory.max", "memory.current", {"active_file", "inactive_file"}},
};

// "" where there is none.
std::string read_text(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::optional<uint64_t> to_number(const std::string& text) {
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{}) return std::nullopt;  // no such file, or "max"
  return number;
}

// The number behind `key` in lines "key number"; 0 where there is none.
uint64_t number_of(const std::string& text, const std::string& key) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name;
    uint64_t number = 0;
    if (words >> name >> number && name == key) return number;
  }
  return 0;
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, at);) parts.push_back(part);
  return parts;
}

bool is_among(const std::string& word, const std::string& list) {
  for (const std::string& each : split(list, ',')) {
    if (each == word) return true;
  }
  return false;
}

// Paths in mountinfo have a space as \040.
std::string unescape(const std::string& text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    int code = 0;
    if (text[i] == '\\' &&
        std::from_chars(&text[i] + 1, text.data() + std::min(i + 4, text.size()), code, 8).ptr == text.data() + i + 4) {
      plain += static_cast<char>(code);
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

// This process's path in the hierarchy of a version.
std::optional<std::string> own_path(const Version& version, const std::string& cgroup) {
  const bool is_unified = version.file_system == std::string("cgroup2");
  for (const std::string& line : split(cgroup, '\n')) {  // "4:memory:/a/b", "0::/a/b"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (is_unified ? line.starts_with("0::") : is_among("memory", controllers)) return line.substr(second + 1);
  }
  return std::nullopt;
}

struct Folders {
  std::string top, inner;  // the mounted one, and the way down from it: "" or "/a/b"
};
std::optional<Folders> own_folders(const Version& version, const std::string& path, const std::string& mountinfo) {
  for (const std::string& line : split(mountinfo, '\n')) {
    const std::vector<std::string> words = split(line, ' ');
    size_t dash = 6;  // any number of optional words come before it
    while (dash < words.size() && words[dash] != "-") ++dash;
    if (dash + 3 >= words.size() || words[dash + 1] != version.file_system) continue;
    if (version.file_system == std::string("cgroup") && !is_among("memory", words[dash + 3])) continue;
    const std::string root = words[3] == "/" ? "" : unescape(words[3]);
    const bool is_inside = path.starts_with(root + "/") && path.find("/..") == std::string::npos;
    // Else only what is mounted can be seen, which is a cgroup above this process's.
    return Folders{unescape(words[4]), is_inside && path != root + "/" ? path.substr(root.size()) : ""};
  }
  return std::nullopt;
}

std::string sizes(const std::string& what, uint64_t bytes) {
  return "memory: cannot allocate " + what + ": " + std::to_string(bytes) + " bytes are needed, and ";
}

void require_room(const std::string& what, uint64_t bytes, const std::string& who, uint64_t limit, uint64_t held) {
  const uint64_t needed = bytes + bytes / 128;  // with the page tables of both sides, which may be on this machine
  if (needed <= limit && held <= limit - needed) return;
  throw Error(Failure::kSetup, sizes(what, bytes) + who + " " + std::to_string(limit) + " bytes, of which " +
                                   std::to_string(held) +
                                   " are held already; raise the limit, end what holds it, or make the shape smaller");
}

void require_room_in_cgroup(const Version& version, const std::string& folder, const std::string& what,
                            uint64_t bytes) {
  const auto limit = to_number(read_text(folder + "/" + version.limit));
  const auto held = to_number(read_text(folder + "/" + version.held));
  if (!limit || !held || *held + bytes + bytes / 128 <= *limit) return;  // mostly: reading more takes a while
  const std::string stat = read_text(folder + "/memory.stat");
  uint64_t reclaimable = 0;
  for (const char* key : version.reclaimable) reclaimable += number_of(stat, key);
  const std::string who = "the memory cgroup " + folder + " may have (" + version.limit + ")";
  require_room(what, bytes, who, *limit, *held - std::min(reclaimable, *held));
}

}  // namespace

void require_memory(const std::string& what, uint64_t bytes, const std::string& proc) {
  const std::string meminfo = read_text(proc + "/meminfo");
  const uint64_t total = number_of(meminfo, "MemTotal:") * 1024, free = number_of(meminfo, "MemAvailable:") * 1024;
  if (total != 0) require_room(what, bytes, "this machine has", total, total - std::min(free, total));
  const std::string cgroup = read_text(proc + "/self/cgroup"), mountinfo = read_text(proc + "/self/mountinfo");
  for (const Version& version : kVersions) {
    const auto path = own_path(version, cgroup);
    auto folders = path ? own_folders(version, *path, mountinfo) : std::nullopt;
    if (!folders) continue;
    // From this process's own cgroup up to the mounted one.
    for (std::string& inner = folders->inner;; inner.erase(inner.rfind('/'))) {
      require_room_in_cgroup(version, folders->top + inner, what, bytes);
      if (inner.empty()) break;
    }
  }
}

void require_file_size(const std::string& what, uint64_t bytes) {
  rlimit limit{};
  if (getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY || bytes <= limit.rlim_cur) return;
  throw Error(Failure::kSetup, sizes(what, bytes) + "files of this process may have " + std::to_string(limit.rlim_cur) +
                                   " bytes, shared memory among them (RLIMIT_FSIZE); raise the limit (ulimit -f), or "
                                   "make the shape smaller");
}

}  // namespace m2n
