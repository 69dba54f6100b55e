// SPDX-License-Identifier: Apache-2.0
// Reading the names of transports, and the table of those that this build has.
#include "transport/choice.h"

#include <algorithm>
#include <charconv>
#include <string_view>

#include "core/error.h"

namespace m2n {
namespace {

using Kind = Choice::Kind;
using Way = UcxOptions::Way;

[[noreturn]] void refuse(const std::string& text) { throw Error(Failure::kSetup, "transport: " + text); }

// Those below take what stands behind the name of a kind. False: that is none of it.

bool read_nothing(const std::string&, std::string_view rest, Choice*) { return rest.empty(); }

[[maybe_unused]] bool read_device(const std::string& name, std::string_view rest, Choice* choice) {
  choice->device = choice->kind == Kind::kCuda ? name : rest.substr(std::min<size_t>(1, rest.size()));
  return choice->kind == Kind::kCuda || rest.starts_with(':');
}

// ":delay_ns=500000,jitter_ns=100000,seed=1:inner"
bool read_faults(const std::string& name, std::string_view rest, Choice* choice) {
  constexpr int64_t kMaxDelayNs = 10'000'000'000;
  bool is_good = true;
  const auto take = [&](std::string_view text) {
    is_good = is_good && rest.starts_with(text);
    if (is_good) rest.remove_prefix(text.size());
  };
  const auto take_number = [&]<class T>(std::string_view key, T& number) {
    take(key);
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), number);
    is_good = is_good && error == std::errc{} && number >= 0;
    if (is_good) rest.remove_prefix(static_cast<size_t>(end - rest.data()));
  };
  Faults& faults = choice->faults;
  take_number(":delay_ns=", faults.delay_ns);
  take_number(",jitter_ns=", faults.jitter_ns);
  take_number(",seed=", faults.seed);
  take(":");
  is_good = is_good && faults.delay_ns <= kMaxDelayNs && faults.jitter_ns <= kMaxDelayNs - faults.delay_ns;
  if (!is_good || rest.empty() || rest.starts_with("faulty:")) {
    refuse("expected 'faulty:delay_ns=<int>,jitter_ns=<int>,seed=<int>:<another>' with at most " +
           std::to_string(kMaxDelayNs) + " ns of delay and jitter, got '" + name + "'");
  }
  choice->inner = std::make_shared<Choice>(read_choice(std::string(rest)));
  return true;
}

// Hands each ";key=value" over to take(key, value, has_value, choice); what that does not take is refused.
template <class Take>
bool read_options(const std::string& expected, const std::string& name, std::string_view rest, Choice* choice,
                  Take&& take) {
  const auto refuse_part = [&](std::string_view part) {
    refuse("expected " + expected + ", got '" + std::string(part) + "' in '" + name + "'");
  };
  if (!rest.empty() && rest[0] != ';') refuse_part(name.substr(0, name.find(';')));
  while (!rest.empty()) {
    rest.remove_prefix(1);
    const std::string_view part = rest.substr(0, rest.find(';'));
    const size_t equals = std::min(part.find('='), part.size());
    const std::string value(part.substr(std::min(equals + 1, part.size())));
    if (!take(std::string(part.substr(0, equals)), value, equals != part.size(), choice)) refuse_part(part);
    rest.remove_prefix(part.size());
  }
  return true;
}

bool read_tcp(const std::string& name, std::string_view rest, Choice* choice) {
  return read_options("'tcp' or 'auto' and ';device=...'", name, rest, choice,
                      [](const std::string& key, const std::string& value, bool, Choice* taken) {
                        taken->device = value;
                        return key == "device" && !value.empty();
                      });
}

bool take_ucx_option(const std::string& key, const std::string& value, bool has_value, Choice* choice) {
  UcxOptions& ucx = choice->ucx;
  if (key == "library") {
    ucx.library = value;
  } else if (key == "beside") {
    ucx.beside = value;
  } else if (key == "device") {
    choice->device = value;
  } else if (key == "rows") {
    choice->inner = std::make_shared<Choice>(read_choice(value));
  } else if (key == "insecure") {
    ucx.is_insecure = true;
  } else if (key == "way" && (value == "auto" || value == "message" || value == "put")) {
    ucx.way = value == "auto" ? Way::kAuto : value == "put" ? Way::kPut : Way::kMessage;
  } else if (!key.empty() && key[0] >= 'A' && key[0] <= 'Z' && has_value) {
    ucx.variables.emplace_back(key, value);
  } else {
    return false;
  }
  return true;
}

bool read_ucx(const std::string& name, std::string_view rest, Choice* choice) {
  constexpr const char* kExpected =
      "'ucx' and ';key=value' for way (auto, message, put), library, beside, device, rows, insecure or a variable of "
      "UCX";
  return read_options(kExpected, name, rest, choice, take_ucx_option);
}

struct Known {
  std::string name;
  Kind kind;
  bool (*read)(const std::string& name, std::string_view rest, Choice* choice);
  std::unique_ptr<Transport> (*make)(const Choice& choice);
};

const std::vector<Known>& all_known() {
  static const std::vector<Known> all = {
      {"shm", Kind::kShm, read_nothing, make_shm_transport},
      {"auto", Kind::kAuto, read_tcp, make_tcp_transport},
      {"faulty", Kind::kFaulty, read_faults, make_faulty_transport},
      {"tcp", Kind::kTcp, read_tcp, make_tcp_transport},
      {"ucx", Kind::kUcx, read_ucx, make_ucx_transport},
#if M2N_HAS_CUDA
      {"cuda", Kind::kCuda, read_device, make_cuda_transport},
      {"pinned", Kind::kPinned, read_device, make_pinned_transport},
      {"gpudirect", Kind::kGpuDirect, read_device, make_cuda_transport},
#endif
  };
  return all;
}

}  // namespace

#if !M2N_HAS_CUDA
std::string why_no_cuda() { return "not compiled in: no CUDA compiler was found at build time, or M2N_CUDA=OFF"; }
#endif

Choice read_choice(const std::string& name) {
  std::string names;
  for (const Known& known : all_known()) {
    names += (names.empty() ? "" : ", ") + known.name;
    Choice choice{known.kind};
    if (!name.starts_with(known.name)) continue;
    if (known.read(name, std::string_view(name).substr(known.name.size()), &choice)) return choice;
  }
  refuse("'" + name + "' is not known to this build; known: " + names +
         (M2N_HAS_CUDA ? "" : "; cuda, pinned and gpudirect are " + why_no_cuda()));
}

std::unique_ptr<Transport> make_transport(const Choice& choice) {
  const auto is_it = [&](const Known& known) { return known.kind == choice.kind; };
  return std::find_if(all_known().begin(), all_known().end(), is_it)->make(choice);
}

std::string describe_transport(const std::string& name) {
  const Choice choice = read_choice(name);
  if (choice.kind == Kind::kUcx) return describe_ucx(choice.ucx);
  make_transport(choice);
  return "";
}

}  // namespace m2n
