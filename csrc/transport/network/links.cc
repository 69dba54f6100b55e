// SPDX-License-Identifier: Apache-2.0
// How links begin and end, whatever carries them.
#include "transport/network/links.h"

#include <sched.h>

#include "core/error.h"
#include "transport/host_exec.h"

namespace m2n {
namespace {

constexpr int64_t kDrainNs = 5'000'000'000;
// The watcher of processes knows better why a connection broke, a moment later.
constexpr int64_t kGraceNs = 200'000'000;

}  // namespace

void NetworkLinks::fail(const std::string& text) const { throw Error(Failure::kSetup, kind_ + ": " + text); }

void NetworkLinks::require_open() const {
  if (is_closed_) fail("the comm is closed");
}

void NetworkLinks::open(const Network::Peers& peers, std::shared_ptr<Window> rows_areas,
                        std::function<void()> on_signal, std::function<void()> on_report) {
  std::lock_guard lock(mutex_);
  areas_.open(peers, std::move(rows_areas));
  on_signal_ = std::move(on_signal);
  on_report_ = std::move(on_report);
}

std::string NetworkLinks::make_address(uint32_t peer_idx, const Areas& own) {
  std::lock_guard lock(mutex_);
  require_open();
  if (links_.size() <= peer_idx) links_.resize(peer_idx + 1);
  links_[peer_idx] = make_link();
  NetworkLink& link = *links_[peer_idx];
  link.peer_idx = peer_idx;
  link.key = random_number();
  link.own = own;
  return write_door_of(link);
}

void NetworkLinks::mark_broken(NetworkLink& link, const std::string& violation) {
  if (link.is_broken) return;
  link.is_broken = true;
  link.violation = violation;
  link.tell_ns = now_ns() + (violation.empty() ? kGraceNs : 0);
  if (on_report_) on_report_();
}

void NetworkLinks::end(uint32_t peer_idx) {
  std::lock_guard lock(mutex_);
  NetworkLink* link = find(peer_idx);
  if (link == nullptr || is_closed_) return;
  link->ending_ns = now_ns();
  on_report_();
}

void NetworkLinks::end_now(uint32_t peer_idx) {
  std::lock_guard lock(mutex_);
  NetworkLink* link = find(peer_idx);
  if (link != nullptr && !link->is_ended && !is_closed_) end_link(*link);
}

bool NetworkLinks::release(uint32_t peer_idx) {
  std::lock_guard lock(mutex_);
  NetworkLink* link = find(peer_idx);
  if (link == nullptr) return true;
  if (is_closed_ || is_reporting_ || !let_go(*link)) return false;
  areas_.remove(peer_idx);
  links_[peer_idx].reset();
  return true;
}

void NetworkLinks::drain() {
  const int64_t until_ns = now_ns() + kDrainNs;
  while (num_sending() != 0 && now_ns() < until_ns) {
    look();
    sched_yield();
  }
}

int64_t NetworkLinks::report(LinkListener& listener) {
  int64_t next_ns = -1;
  std::vector<std::pair<uint32_t, std::string>> broken;
  std::vector<uint32_t> ended;
  {
    std::lock_guard lock(mutex_);
    if (is_closed_) return -1;
    is_reporting_ = true;
    const int64_t now = now_ns();
    const auto is_due = [&](int64_t at_ns) {
      if (now >= at_ns) return true;
      if (next_ns < 0 || at_ns - now < next_ns) next_ns = at_ns - now;
      return false;
    };
    for (const auto& link : links_) {
      if (link == nullptr || link->is_ended) continue;
      if (link->ending_ns >= 0) {
        if (link->is_broken || !tells_of_ends_ || is_due(link->ending_ns + kEndingNs)) ended.push_back(link->peer_idx);
      } else if (link->is_broken && !link->is_told && is_due(link->tell_ns)) {
        broken.emplace_back(link->peer_idx, link->violation);
      }
    }
  }
  for (const auto& [peer_idx, violation] : broken) {
    listener.link_broke(peer_idx, violation);  // one that throws is told again
    std::lock_guard lock(mutex_);
    find(peer_idx)->is_told = true;  // there: nothing is released meanwhile
  }
  for (uint32_t peer_idx : ended) {
    end_now(peer_idx);
    listener.link_ended(peer_idx);
  }
  std::lock_guard lock(mutex_);
  is_reporting_ = false;
  return next_ns;
}

}  // namespace m2n
