// SPDX-License-Identifier: Apache-2.0
// The only file that names memory orders. Everything above speaks of the operations below; each use carries
// a `SYNC: label` comment that its partner repeats.
//
// Back ends: host (std::atomic_ref), device (cuda::atomic_ref; system scope, and device scope for what only the blocks
// of one launch share), and in tests, with M2N_EXPLORER, a model of a memory that tests/core/explorer declares before
// this file. A signal is stored seq_cst on the host because a waiter may sleep: see wake.h for the four operations that
// must be totally ordered. A device never sleeps, so release and acquire suffice there.
#pragma once

#include "core/platform.h"

#if defined(__CUDA_ARCH__)
#include <cuda/atomic>
#elif !defined(M2N_EXPLORER)
#include <atomic>
#endif

namespace m2n {

#if defined(__CUDA_ARCH__)
namespace order = cuda::std;
template <class T>
using AtomicRef = cuda::atomic_ref<T, cuda::thread_scope_system>;
template <class T>
using BlocksRef = cuda::atomic_ref<T, cuda::thread_scope_device>;
#elif defined(M2N_EXPLORER)
namespace order = explorer;
template <class T>
using AtomicRef = explorer::AtomicRef<T>;
template <class T>
using BlocksRef = AtomicRef<T>;
#else
namespace order = std;
template <class T>
using AtomicRef = std::atomic_ref<T>;
template <class T>
using BlocksRef = AtomicRef<T>;
#endif

// std::atomic_ref<const T> arrives only with C++26; a load does not write, so the cast is harmless.
template <class T>
M2N_HD AtomicRef<T> atomic_ref(const T* word) {
  return AtomicRef<T>(*const_cast<T*>(word));
}

template <class T>
M2N_HD T load_relaxed(const T* word) {
  return atomic_ref(word).load(order::memory_order_relaxed);
}
template <class T>
M2N_HD T load_acquire(const T* word) {
  return atomic_ref(word).load(order::memory_order_acquire);
}
template <class T>
M2N_HD void store_relaxed(T* word, T value) {
  atomic_ref(word).store(value, order::memory_order_relaxed);
}
template <class T>
M2N_HD void store_release(T* word, T value) {
  atomic_ref(word).store(value, order::memory_order_release);
}
template <class T>
M2N_HD T load_seq_cst(const T* word) {
  return atomic_ref(word).load(order::memory_order_seq_cst);
}
template <class T>
M2N_HD void store_seq_cst(T* word, T value) {
  atomic_ref(word).store(value, order::memory_order_seq_cst);
}
template <class T>
M2N_HD T add_seq_cst(T* word, T value) {
  return atomic_ref(word).fetch_add(value, order::memory_order_seq_cst);
}
// Stores `value` where the word is still `expected`.
template <class T>
M2N_HD bool replace_seq_cst(T* word, T expected, T value) {
  return atomic_ref(word).compare_exchange_strong(expected, value, order::memory_order_seq_cst);
}
// Among the blocks of one launch, which is less far on a device than to a peer.
template <class T>
M2N_HD T add_acq_rel(T* word, T value) {
  return BlocksRef<T>(*word).fetch_add(value, order::memory_order_acq_rel);
}
template <class T>
M2N_HD T load_acquire_of_blocks(T* word) {
  return BlocksRef<T>(*word).load(order::memory_order_acquire);
}
template <class T>
M2N_HD void store_release_to_blocks(T* word, T value) {
  BlocksRef<T>(*word).store(value, order::memory_order_release);
}
template <class T>
M2N_HD T add_relaxed(T* word, T value) {
  return atomic_ref(word).fetch_add(value, order::memory_order_relaxed);
}

// The signal of a slot: everything written before the store is visible after a load that sees it.
M2N_HD inline void store_signal(uint64_t* word, uint64_t value) {
#if defined(__CUDA_ARCH__)
  atomic_ref(word).store(value, order::memory_order_release);
#else
  atomic_ref(word).store(value, order::memory_order_seq_cst);
#endif
}
M2N_HD inline uint64_t load_signal(const uint64_t* word) {
#if defined(__CUDA_ARCH__)
  return atomic_ref(word).load(order::memory_order_acquire);
#else
  return atomic_ref(word).load(order::memory_order_seq_cst);
#endif
}
// What a waiter looks at beside signals: the state of a peer. Its writer wakes like that of a signal.
M2N_HD inline uint32_t load_state(const uint32_t* word) {
#if defined(__CUDA_ARCH__)
  return load_acquire(word);
#else
  return load_seq_cst(word);
#endif
}

}  // namespace m2n
