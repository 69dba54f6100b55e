// SPDX-License-Identifier: Apache-2.0
// Reading the case, meeting at the board, and the sum that contenders without one need.
#include "job.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <sstream>

#include "exchange/bodies/combine.h"

namespace m2n::bench {
namespace {

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

DType parse_dtype(const std::string& name) {
  return name == "float32" ? DType::kFloat32 : name == "float16" ? DType::kFloat16 : DType::kBFloat16;
}

}  // namespace

Case read_case(const std::string& folder) {
  Case job;
  job.folder = folder;
  std::istringstream lines(read_file(folder + "/case.txt"));
  for (std::string text; std::getline(lines, text);) {
    const size_t space = std::min(text.find(' '), text.size());
    const std::string key = text.substr(0, space);
    const std::string value = space == text.size() ? "" : text.substr(space + 1);  // a path may have spaces too
    if (key == "cores") {
      std::istringstream line(value);
      job.cores = {std::istream_iterator<int>(line), {}};
    } else if (key == "contender") {
      job.contenders.push_back(value);
    } else {
      const auto number = [&] { return static_cast<uint32_t>(std::stoul(value)); };
      if (key == "m")
        job.num_attention = number();
      else if (key == "n")
        job.num_expert = number();
      else if (key == "x_stride_rows")
        job.x_stride_rows = number();
      else if (key == "tokens")
        job.num_tokens = number();
      else if (key == "hidden")
        job.shape.hidden = number();
      else if (key == "top_k")
        job.shape.top_k = number();
      else if (key == "experts")
        job.shape.num_experts = number();
      else if (key == "dtype")
        job.shape.dispatch_dtype = job.shape.combine_dtype = parse_dtype(value);
      else if (key == "reduce_at")
        job.shape.reduce_at = value == "attention" ? ReduceAt::kAttention : ReduceAt::kExpert;
      else if (key == "transport")
        job.transport = value;
      else if (key == "ucx_transport")
        job.ucx_transport = value;
      else if (key == "seconds")
        job.seconds = std::stod(value);
      else if (key == "max_rounds")
        job.max_rounds = number();
      else if (key == "deadline_s")
        job.deadline_ns = static_cast<int64_t>(std::stod(value) * 1e9);
      else
        throw std::runtime_error("case.txt: unknown key " + key);
    }
  }
  job.shape.max_tokens = job.num_tokens;
  return job;
}

void* map_shared(const Case& job, const std::string& name, uint64_t bytes) {
  const std::string path = job.folder + "/" + name;
  const Fd file(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (file.get() < 0 || ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) {
    throw std::runtime_error("cannot make " + path);
  }
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  if (data == MAP_FAILED) throw std::runtime_error("cannot map " + path);
  return data;
}

Board::Board(const Case& job, uint32_t process)
    : words_(static_cast<int64_t*>(map_shared(job, "board", (2 + 2 * job.num_processes()) * kLineBytes))),
      num_processes_(job.num_processes()),
      process_(process),
      is_oversubscribed_(job.cores.empty()),
      deadline_ns_(job.deadline_ns) {}

void Board::meet() {
  store_release(arrived_of(process_), ++meeting_);  // SYNC: board-meeting
  for (uint32_t process = 0; process < num_processes_; ++process) {
    wait([&] { return load_acquire(arrived_of(process)) >= meeting_; });  // SYNC: board-meeting
  }
}

int64_t Board::first_start(const Traffic& traffic, const std::vector<uint32_t>& rows) const {
  int64_t first_ns = std::numeric_limits<int64_t>::max();
  for (uint32_t peer = 0; peer < traffic.num_peers(); ++peer) {
    if (rows[peer] != 0) first_ns = std::min(first_ns, load_relaxed(start_of(traffic.process_of_peer(peer))));
  }
  return first_ns;
}

void Board::require_going() {
  if (load_acquire(word(1)) != 0) throw std::runtime_error("another process has failed");  // SYNC: board-failed
  const int64_t now = now_ns();
  if (began_ns_ == 0) began_ns_ = now;
  if (now - began_ns_ > deadline_ns_) throw std::runtime_error("nothing has arrived for too long");
}

Services make_services(const Case& job, Board& board) {
  Services services;
  const std::string folder = job.folder;
  services.publish = [folder](const std::string& name, const std::string& bytes) {
    const std::string path = folder + "/" + name;
    std::ofstream(path + ".part", std::ios::binary) << bytes;
    std::rename((path + ".part").c_str(), path.c_str());  // whole, or not there yet
  };
  services.look_up = [folder, &board](const std::string& name) {
    const std::string path = folder + "/" + name;
    board.wait([&] { return access(path.c_str(), F_OK) == 0 || (usleep(100), false); });
    return read_file(path);
  };
  services.shared_memory = [job](const std::string& name, uint64_t bytes) { return map_shared(job, name, bytes); };
  services.wait = [&board](const std::function<bool()>& ready) { board.wait(ready); };
  services.is_oversubscribed = job.cores.empty();
  return services;
}

std::vector<uint32_t> experts_of(const Case& job, uint32_t expert_rank) {
  std::vector<uint32_t> experts;
  const uint32_t num_local = job.shape.num_experts / job.num_expert;
  for (uint32_t i = 0; i < num_local; ++i) experts.push_back(expert_rank * num_local + i);
  return experts;
}

Job make_job(const Case& options, uint32_t process) {
  Job job{options, {}, {}};
  const Shape& shape = options.shape;
  const std::string bytes = read_file(options.folder + "/topk.i32");
  const uint64_t num_pairs = uint64_t{options.num_tokens} * shape.top_k;
  std::vector<int32_t> ids(options.num_attention * num_pairs);
  if (bytes.size() != ids.size() * sizeof(int32_t)) throw std::runtime_error("topk.i32 has another size than the case");
  std::memcpy(ids.data(), bytes.data(), bytes.size());
  const std::vector<float> weights(num_pairs, 0.5f);  // exact in every dtype
  std::vector<int32_t> offsets{0}, ranks;
  for (uint32_t expert = 0; expert < shape.num_experts; ++expert) {
    ranks.push_back(static_cast<int32_t>(expert / (shape.num_experts / options.num_expert)));
    offsets.push_back(static_cast<int32_t>(expert + 1));
  }
  Traffic& traffic = job.traffic;
  traffic.num_attention = options.num_attention;
  traffic.num_expert = options.num_expert;
  traffic.process = process;
  traffic.row_bytes = uint64_t{shape.hidden} * dtype_bytes(shape.dispatch_dtype);
  traffic.x_stride_bytes = traffic.row_bytes * options.x_stride_rows;
  traffic.reply_row_bytes = uint64_t{shape.hidden} * dtype_bytes(shape.combine_dtype);
  for (uint32_t rank = 0; rank < options.num_attention; ++rank) {
    job.routes.push_back(std::make_shared<Route>(shape));
    Route& route = *job.routes.back();
    route.prepare(options.num_tokens, options.num_expert);
    route.build_from_topk(ids.data() + rank * num_pairs, weights.data(), offsets, ranks, rank);
    const RouteView& view = route.view();
    const auto add = [&](uint32_t expert_rank) {
      traffic.rows.push_back(view.row_offsets[expert_rank + 1] - view.row_offsets[expert_rank]);
      const bool is_reduced = shape.reduce_at == ReduceAt::kExpert;
      traffic.reply_rows.push_back(is_reduced ? traffic.rows.back() : view.pair_counts[expert_rank]);
    };
    if (!traffic.is_attention()) {
      add(traffic.rank());
    } else if (rank == traffic.rank()) {
      for (uint32_t expert_rank = 0; expert_rank < options.num_expert; ++expert_rank) add(expert_rank);
      traffic.token_of_row.assign(view.token_of_row, view.token_of_row + route.num_rows());
    }
  }
  return job;
}

void sum_replies(const Job& job, Contender& contender, unsigned char* y) {
  const Shape& shape = job.options.shape;
  const RouteView& route = job.routes[job.traffic.rank()]->view();
  std::vector<const unsigned char*> replies;
  for (uint32_t peer = 0; peer < job.traffic.num_peers(); ++peer) replies.push_back(contender.replies_from(peer));
  const uint64_t row_bytes = job.traffic.reply_row_bytes;
  with_dtype(shape.combine_dtype, [&](auto element) {
    using T = decltype(element);
    Deal deal(0, 1);
    for_each_span(HostExec(nullptr), deal, route.num_tokens, shape.hidden, false,
                  [&](uint32_t token, const Spans& spans) {
                    const uint64_t from = uint64_t{token} * shape.top_k;
                    const auto row_at = [&](uint32_t i) -> const T* {
                      const int32_t rank = route.source_rank[from + i];
                      if (rank == kNone) return nullptr;
                      return row_of<T>(replies[static_cast<size_t>(rank)], row_bytes,
                                       static_cast<uint64_t>(route.source_row[from + i]));
                    };
                    T* out = reinterpret_cast<T*>(y + token * row_bytes);
                    if (shape.reduce_at == ReduceAt::kExpert) {
                      sum_spans<false, T>(out, spans, shape.top_k, row_at, [](uint32_t) { return 1.0f; });
                    } else {
                      sum_spans<true, T>(out, spans, shape.top_k, row_at,
                                         [&](uint32_t i) { return route.source_weight[from + i]; });
                    }
                  });
  });
}

std::unique_ptr<Contender> make_contender(const Job& job, Board& board, const std::string& name) {
  const size_t split = name.find('=');
  if (split == std::string::npos) {
    if (name.starts_with("m2n")) return make_m2n(job, name);
    if (name == "socket") return make_socket(job, board);
    return make_limit(job, board, name);
  }
  const std::string path = name.substr(split + 1);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  const auto make = reinterpret_cast<decltype(&::make_contender)>(dlsym(library, "make_contender"));
  if (make == nullptr) throw std::runtime_error(dlerror());
  return std::unique_ptr<Contender>(make(name.substr(0, split), job.traffic, make_services(job.options, board)));
}

}  // namespace m2n::bench
