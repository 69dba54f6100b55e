// SPDX-License-Identifier: Apache-2.0
// For LD_PRELOAD: counts the bytes that one thread moves by calls to memcpy and its kin, and by system calls that copy,
// between two marks. `m2n-bench copies` compiles it.
//
// What the compiler has made of a copy (stores in a loop, a sum) makes no call and is not seen here.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

static __thread uint64_t least;  // bytes of a call that counts; 0: none counts
static __thread uint64_t memory_bytes, kernel_bytes;

// From here on this thread's system calls count, and its memcpys of at least `num_bytes` (not 0): of rows, not headers.
void m2n_copies_begin(uint64_t num_bytes) {
  memory_bytes = kernel_bytes = 0;
  least = num_bytes;
}

// Ends it. counts[0]: bytes that memcpy and its kin have moved, counts[1]: that the kernel has copied.
void m2n_copies_end(uint64_t* counts) {
  least = 0;
  counts[0] = memory_bytes;
  counts[1] = kernel_bytes;
}

static void note_memory(size_t num_bytes) {
  if (least != 0 && num_bytes >= least) memory_bytes += num_bytes;
}

static ssize_t note_kernel(ssize_t num_bytes) {
  if (least != 0 && num_bytes > 0) kernel_bytes += (uint64_t)num_bytes;  // a read may bring any part of the rows
  return num_bytes;
}

static void* (*real_memmove)(void*, const void*, size_t);

__attribute__((constructor)) static void find_memmove(void) { *(void**)&real_memmove = dlsym(RTLD_NEXT, "memmove"); }

static void* move(void* to, const void* from, size_t num_bytes) {
  if (real_memmove != NULL) return real_memmove(to, from, num_bytes);
  // The loader's own copies come before any constructor.
  unsigned char* out = to;
  const unsigned char* in = from;
  if (out <= in) {
    for (size_t i = 0; i < num_bytes; ++i) out[i] = in[i];
  } else {
    for (size_t i = num_bytes; i-- > 0;) out[i] = in[i];
  }
  return to;
}

void* memcpy(void* to, const void* from, size_t num_bytes) { return note_memory(num_bytes), move(to, from, num_bytes); }
void* memmove(void* to, const void* from, size_t num_bytes) { return memcpy(to, from, num_bytes); }
void* mempcpy(void* to, const void* from, size_t num_bytes) { return (char*)memcpy(to, from, num_bytes) + num_bytes; }

// Of programs that are compiled with _FORTIFY_SOURCE: the size is checked.
static void require_room(size_t num_bytes, size_t room) {
  if (num_bytes > room) __builtin_trap();
}
void* __memcpy_chk(void* to, const void* from, size_t num_bytes, size_t room) {
  return require_room(num_bytes, room), memcpy(to, from, num_bytes);
}
void* __memmove_chk(void* to, const void* from, size_t num_bytes, size_t room) {
  return require_room(num_bytes, room), memcpy(to, from, num_bytes);
}
void* __mempcpy_chk(void* to, const void* from, size_t num_bytes, size_t room) {
  return require_room(num_bytes, room), mempcpy(to, from, num_bytes);
}

#define FORWARD(name, parameters, arguments)                    \
  ssize_t name parameters {                                     \
    static ssize_t(*real) parameters;                           \
    if (real == NULL) *(void**)&real = dlsym(RTLD_NEXT, #name); \
    return note_kernel(real arguments);                         \
  }
FORWARD(write, (int fd, const void* data, size_t size), (fd, data, size))
FORWARD(writev, (int fd, const struct iovec* parts, int count), (fd, parts, count))
FORWARD(send, (int fd, const void* data, size_t size, int flags), (fd, data, size, flags))
FORWARD(sendto, (int fd, const void* data, size_t size, int flags, const struct sockaddr* to, socklen_t length),
        (fd, data, size, flags, to, length))
FORWARD(sendmsg, (int fd, const struct msghdr* message, int flags), (fd, message, flags))
FORWARD(read, (int fd, void* data, size_t size), (fd, data, size))
FORWARD(readv, (int fd, const struct iovec* parts, int count), (fd, parts, count))
FORWARD(recv, (int fd, void* data, size_t size, int flags), (fd, data, size, flags))
FORWARD(recvfrom, (int fd, void* data, size_t size, int flags, struct sockaddr* from, socklen_t* length),
        (fd, data, size, flags, from, length))
FORWARD(recvmsg, (int fd, struct msghdr* message, int flags), (fd, message, flags))
