// SPDX-License-Identifier: Apache-2.0
// Python's lock, given up and taken back. When the interpreter ends, it ends every other thread that wants the lock, by
// unwinding its stack: C++ answers with std::terminate, and destructors on the way touch Python's objects without the
// lock. So here such a thread waits for the end of the process instead.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace m2n::bindings {

namespace py = pybind11;

[[noreturn]] inline void wait_for_the_end() {
  while (true) pause();
}

inline bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// Calls a function of Python's C interface that may run code of Python, which gives up the lock and wants it back. No
// object of C++ may be made inside: it would be destroyed without the lock.
template <class Call>
py::object call_python(Call&& call) {
  PyObject* result;
  try {
    result = call();
  } catch (...) {  // C throws nothing else than the end
    wait_for_the_end();
  }
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Gives up the lock while this lives. Outermost in a binding: a thread that waits for the end holds nothing of ours.
class WithoutLock {
 public:
  WithoutLock() : is_last_thread_(is_finalizing()), state_(PyEval_SaveThread()) { of_this_thread() = this; }
  ~WithoutLock() {
    of_this_thread() = nullptr;
    take_back();
  }
  WithoutLock(const WithoutLock&) = delete;
  WithoutLock& operator=(const WithoutLock&) = delete;

  // nullptr: this thread has given up nothing.
  static WithoutLock*& of_this_thread() {
    static thread_local WithoutLock* guard = nullptr;
    return guard;
  }

  // Throws what the handler of a signal has raised; to be called by a thread that waits without the lock.
  void check_signals() {
    struct Held {
      WithoutLock& guard;
      explicit Held(WithoutLock& of) : guard(of) { guard.take_back(); }
      ~Held() { guard.state_ = PyEval_SaveThread(); }
    };
    const Held held(*this);
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

 private:
  void take_back() {
    // After the end the state's memory may be gone. The thread that ends the interpreter still gets the lock.
    if (is_finalizing() && !is_last_thread_) wait_for_the_end();
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // the interpreter began to end meanwhile: nothing else is thrown here
      wait_for_the_end();
    }
  }

  const bool is_last_thread_;  // it held the lock of an interpreter that ends: no other thread does
  PyThreadState* state_;
};

}  // namespace m2n::bindings
