// SPDX-License-Identifier: Apache-2.0
// Objects of this process by id: ranks of one process share the owner's mapping, so that both sides of a signal are one
// address (ThreadSanitizer sees them as one, and no second mapping is needed).
#pragma once

#include <cstdint>
#include <memory>

#include "transport/transport.h"

namespace m2n {

// Makes an object of `window` findable; its id. Forget it before the window ends.
uint64_t add_local_object(std::weak_ptr<Window> window, unsigned char* data);
void forget_local_object(uint64_t id);
// The same unless somebody has mapped it: then false.
bool forget_unmapped_local_object(uint64_t id);

// Keeps the window alive. Throws Error(kSetup) when its owner has closed it.
std::shared_ptr<Mapping> map_local_object(uint64_t id);

}  // namespace m2n
