// SPDX-License-Identifier: Apache-2.0
// A cable of a given rate and length between two TAP devices in two network namespaces.
//
//   m2n_relay MBIT DELAY_US NAMESPACE DEVICE NAMESPACE DEVICE
//
// Each way, packets take the cable one after another at MBIT megabits per second (0: any), and arrive DELAY_US
// microseconds after their last bit. Nothing is lost or reordered. It says "ready", and ends with its standard input.
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <string>
#include <system_error>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Nanoseconds = std::chrono::nanoseconds;

constexpr std::size_t kMaxPacket = 1 << 16;
constexpr int kTakenAtOnce = 16;  // then those that are due go on

int require(int result, const std::string& what) {
  if (result < 0) throw std::system_error(errno, std::generic_category(), what);
  return result;
}

// The device is the one of the namespace in which this thread is when it opens the driver.
int open_tap(const std::string& name_space, const std::string& device) {
  const int net = require(open(("/run/netns/" + name_space).c_str(), O_RDONLY | O_CLOEXEC), "namespace " + name_space);
  require(setns(net, CLONE_NEWNET), "setns " + name_space);
  close(net);
  const int tap = require(open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), "/dev/net/tun");
  ifreq request{};
  request.ifr_flags = IFF_TAP | IFF_NO_PI;
  std::strncpy(request.ifr_name, device.c_str(), IFNAMSIZ - 1);
  require(ioctl(tap, TUNSETIFF, &request), "device " + device);
  return tap;
}

struct Packet {
  Clock::time_point due;
  std::vector<char> bytes;
};

class Way {
 public:
  Way(int from, int to, double ns_per_byte, Nanoseconds delay)
      : from_(from), to_(to), ns_per_byte_(ns_per_byte), delay_(delay) {}

  void take() {
    char buffer[kMaxPacket];
    for (int i = 0; i < kTakenAtOnce; ++i) {
      const ssize_t size = read(from_, buffer, sizeof buffer);
      if (size <= 0) return;
      free_at_ = std::max(Clock::now(), free_at_) + Nanoseconds(static_cast<int64_t>(ns_per_byte_ * size));
      packets_.push_back({free_at_ + delay_, {buffer, buffer + size}});
    }
  }

  void deliver() {
    while (!packets_.empty() && due() <= Clock::now()) {
      const std::vector<char>& bytes = packets_.front().bytes;
      // A device that is down takes none, as a cable without a host at its end.
      [[maybe_unused]] const ssize_t written = write(to_, bytes.data(), bytes.size());
      packets_.pop_front();
    }
  }

  Clock::time_point due() const { return packets_.empty() ? Clock::time_point::max() : packets_.front().due; }

 private:
  int from_, to_;
  double ns_per_byte_;
  Nanoseconds delay_;
  Clock::time_point free_at_{};  // when the last packet has left the sender
  std::deque<Packet> packets_;   // on their way; the senders' TCP windows bound them
};

int run(char** arguments) {
  const double mbit = std::stod(arguments[0]);
  const Nanoseconds delay(static_cast<int64_t>(std::stod(arguments[1]) * 1e3));
  const double ns_per_byte = mbit > 0 ? 8e3 / mbit : 0;
  const int first = open_tap(arguments[2], arguments[3]), second = open_tap(arguments[4], arguments[5]);
  Way ways[] = {{first, second, ns_per_byte, delay}, {second, first, ns_per_byte, delay}};
  // A cable does not wait for a core, and its timer is exact. Where that is forbidden, what is measured tells.
  const sched_param priority{1};
  if (sched_setscheduler(0, SCHED_FIFO, &priority) < 0) std::perror("m2n_relay: no real-time priority");
  std::puts("ready");
  std::fflush(stdout);
  while (true) {
    pollfd watched[] = {{first, POLLIN, 0}, {second, POLLIN, 0}, {STDIN_FILENO, 0, 0}};
    timespec timeout{};
    const Clock::time_point due = std::min(ways[0].due(), ways[1].due());
    const bool is_empty = due == Clock::time_point::max();
    if (!is_empty) {
      const int64_t left_ns = std::max<int64_t>(0, Nanoseconds(due - Clock::now()).count());
      timeout = {left_ns / 1'000'000'000, left_ns % 1'000'000'000};
    }
    require(ppoll(watched, 3, is_empty ? nullptr : &timeout, nullptr), "ppoll");
    if (watched[2].revents != 0) return 0;  // whoever started it is gone
    for (Way& way : ways) {
      way.take();
      way.deliver();
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 7) {
    std::fputs("usage: m2n_relay MBIT DELAY_US NAMESPACE DEVICE NAMESPACE DEVICE\n", stderr);
    return 2;
  }
  try {
    return run(arguments + 1);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "m2n_relay: %s\n", error.what());
    return 1;
  }
}
