// SPDX-License-Identifier: Apache-2.0
// A peer that sends what it must not, over UCX itself: the link is broken, with words; a stranger's messages are
// nobody's. Nothing outside the objects of the link is written. Usage: ucx_garbage LIBRARY.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <utility>
#include <vector>

#include "core/error.h"
#include "transport/host_exec.h"
#include "transport/ucx/links.h"

namespace {

using namespace m2n;
using namespace m2n::ucx;

constexpr uint64_t kBytes = 4096;
constexpr unsigned char kGuard = 0xA5;

void require(bool is_so, const char* what) {
  if (is_so) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

// A rank with one link: its two objects, with bytes between and around them that nobody may touch.
struct Rank : LinkListener {
  Rank(const Choice& choice, std::shared_ptr<Window> rows_areas) : links(choice), memory(5 * kBytes, kGuard) {
    std::memset(rows(), 0, kBytes);
    std::memset(meta(), 0, kBytes);
    links.open({1, kBytes, kBytes}, std::move(rows_areas), [] {}, [] {});
    address = links.make_address(0, {rows(), kBytes, meta(), kBytes});
  }
  void link_broke(uint32_t, const std::string& violation) override {
    is_broken = true;
    text = violation;
  }
  void link_ended(uint32_t) override {}
  unsigned char* rows() { return memory.data() + kBytes; }
  unsigned char* meta() { return memory.data() + 3 * kBytes; }
  uint64_t word() { return load_signal(reinterpret_cast<const Signal*>(meta())); }
  bool is_guarded() const {
    for (size_t i = 0; i < memory.size(); ++i) {
      const size_t page = i / kBytes;
      if (page % 2 == 0 && memory[i] != kGuard) return false;
    }
    return true;
  }

  Links links;
  std::vector<unsigned char> memory;
  std::string address, text;
  bool is_broken = false;
};

// Two ranks, and an endpoint of ours to the second, by which anything can be sent to it.
struct Pair {
  // `rows_areas`: of a receiver whose rows no message may touch; it would not connect to such a sender.
  explicit Pair(const Choice& choice, std::shared_ptr<Window> rows_areas = nullptr)
      : api(load(choice.ucx.library, "")), sender(choice, nullptr), receiver(choice, rows_areas) {
    bool wakes = false;
    sender.links.connect(0, receiver.address, Fd(), &wakes);
    if (rows_areas == nullptr) receiver.links.connect(0, sender.address, Fd(), &wakes);
    require(read_address(receiver.address, &address), "the address reads");
    Config* config = nullptr;
    require(api.config_read(nullptr, nullptr, &config) == Status::kOk, "config");
    Params params;
    params.features = Params::kAm;
    require(api.init_version(kMajor, kMinor, &params, config, &context) == Status::kOk, "context");
    api.config_release(config);
    WorkerParams worker_params;
    require(api.worker_create(context, &worker_params, &worker) == Status::kOk, "worker");
    EndpointParams endpoint_params;
    endpoint_params.address = reinterpret_cast<const Address*>(address.worker.data());
    require(api.ep_create(worker, &endpoint_params, &endpoint) == Status::kOk, "endpoint");
  }
  ~Pair() {
    api.worker_destroy(worker);
    api.cleanup(context);
  }
  void progress(int count) {
    for (int i = 0; i < count; ++i) {
      api.worker_progress(worker);
      sender.links.look();
      receiver.links.look();
      receiver.links.report(receiver);
    }
  }
  // What goes over TCP takes its time on a busy machine.
  template <class IsDone>
  void await(IsDone&& is_done) {
    const int64_t until_ns = now_ns() + 10'000'000'000;
    while (!is_done() && now_ns() < until_ns) progress(1);
  }
  void send(std::vector<unsigned char> bytes, size_t data_bytes) {
    headers.push_back(std::move(bytes));  // UCX may read it for as long as this lives
    const std::vector<unsigned char>& header = headers.back();
    static const std::vector<unsigned char> data(1 << 20, 0x5A);
    RequestParam param;
    const Request request = api.am_send_nbx(endpoint, 0, header.data(), header.size(), data.data(), data_bytes, &param);
    require(!is_error(request), "send");
    progress(2000);
    if (request != nullptr) api.request_free(request);
  }
  std::vector<unsigned char> header(const MessageHead& head, const std::vector<MessagePart>& parts) const {
    std::vector<unsigned char> bytes(sizeof head + parts.size() * sizeof(MessagePart));
    std::memcpy(bytes.data(), &head, sizeof head);
    if (!parts.empty()) std::memcpy(bytes.data() + sizeof head, parts.data(), parts.size() * sizeof(MessagePart));
    return bytes;
  }

  const Api& api;
  Rank sender, receiver;
  LinkAddress address;
  std::list<std::vector<unsigned char>> headers;
  Context* context = nullptr;
  Worker* worker = nullptr;
  Endpoint* endpoint = nullptr;
};

void check_violations(const Choice& choice) {
  struct Case {
    const char* words;
    uint16_t num_parts;
    uint64_t word_offset;
    MessagePart part;
    size_t data_bytes;
  };
  const Case cases[] = {
      {"object 0", 1, 0, {0, 0, kBytes - 8, 16}, 16},
      {"object 0", 1, 0, {0, 0, ~0ull - 7, 16}, 16},
      {"object 2", 1, 0, {2, 0, 0, 16}, 16},
      {"of data", 1, 0, {0, 0, 0, 16}, 32},
      {"object 0", 1, 0, {0, 0, 0, 1 << 20}, 1 << 20},  // by rendezvous, were it taken
      {"a signal at", 0, kBytes, {}, 0},
      {"a signal at", 0, 4, {}, 0},
      {"parts", 60000, 0, {}, 0},
      {"a header of", 2, 0, {}, 0},
  };
  for (const Case& one : cases) {
    Pair pair(choice);
    const MessageHead head{pair.address.key, pair.address.link, one.num_parts, 0, one.word_offset, make_signal(1, 1)};
    std::vector<MessagePart> parts;
    if (one.num_parts == 1) parts.push_back(one.part);
    pair.send(pair.header(head, parts), one.data_bytes);
    pair.await([&] { return pair.receiver.is_broken; });
    require(pair.receiver.is_broken && pair.receiver.text.find(one.words) != std::string::npos, one.words);
    require(pair.receiver.is_guarded() && pair.receiver.word() == 0, "a bad message changes nothing");
  }
}

void check_strangers(const Choice& choice) {
  Pair pair(choice);
  const MessagePart part{0, 0, 0, 16};
  pair.send(pair.header({pair.address.key + 1, pair.address.link, 1, 0, 0, make_signal(1, 1)}, {part}), 16);
  pair.send(pair.header({pair.address.key, pair.address.link + 1, 1, 0, 0, make_signal(1, 1)}, {part}), 16);
  pair.send({1, 2, 3}, 16);
  pair.send({}, 0);
  require(!pair.receiver.is_broken && pair.receiver.word() == 0 && pair.receiver.rows()[0] == 0, "a stranger");
  pair.send(pair.header({pair.address.key, pair.address.link, 1, 0, 8, make_signal(1, 1)}, {part}), 16);
  const auto* second = reinterpret_cast<const Signal*>(pair.receiver.meta() + 8);
  pair.await([&] { return load_signal(second) != 0; });
  require(load_signal(second) == make_signal(1, 1) && pair.receiver.rows()[15] == 0x5A, "a good message arrives");
  require(pair.receiver.is_guarded(), "and nothing else");
}

void check_rows_elsewhere(const Choice& choice) {
  Pair pair(choice, make_host_transport()->make_window(kBytes, kBytes, 1));
  const MessagePart part{0, 0, 0, 16};
  pair.send(pair.header({pair.address.key, pair.address.link, 1, 0, 0, make_signal(1, 1)}, {part}), 16);
  pair.await([&] { return pair.receiver.is_broken; });
  require(pair.receiver.text == "it sent a message where all must be put", "a message where all must be put");
  require(pair.receiver.rows()[0] == 0 && pair.receiver.word() == 0, "it changes nothing");
}

// Before a processor reads through an address of the GPU's as if it were the host's.
void check_without_cuda(Choice choice) {
  choice.device = "cuda:0";
  choice.inner = std::make_shared<Choice>();
  try {
    Links links(choice);
    require(false, "rows of a GPU need a UCX with CUDA");
  } catch (const Error& error) {
    require(
        error.kind() == Failure::kArgument && std::strstr(error.what(), "needs a UCX that knows the memory of GPUs"),
        error.what());
  }
}

}  // namespace

int main(int, char** arguments) {
  Choice choice;
  choice.ucx.library = arguments[1];
  choice.ucx.variables = {{"TLS", "tcp,self"}};
  check_violations(choice);
  check_strangers(choice);
  check_rows_elsewhere(choice);
  check_without_cuda(choice);
  std::printf("ten bad messages, four of strangers, one good\n");
}
