// SPDX-License-Identifier: Apache-2.0
// For LD_PRELOAD: what the system does now and then. A signal interrupts two of three calls for memory; on demand there
// are no more threads.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>

static int num_calls;
int no_more_threads;

int posix_fallocate(int fd, off_t offset, off_t length) {
  if (++num_calls % 3 != 0) return EINTR;
  return fallocate(fd, 0, offset, length) == 0 ? 0 : errno;
}

typedef int Create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*), void* argument) {
  static Create* create;
  if (create == NULL) create = (Create*)dlsym(RTLD_NEXT, "pthread_create");
  return no_more_threads ? EAGAIN : create(thread, attributes, body, argument);
}
