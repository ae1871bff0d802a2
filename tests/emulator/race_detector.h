// Finds accesses to one address that nothing orders: what the emulator tells it, and nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_emulator.h"

namespace cuda_emulator {

// As `fail`, at this code.
[[noreturn]] void fail_at(const void* code, const std::string& what);

}  // namespace cuda_emulator

namespace cuda_emulator::races {

// A launch begins; what lies in [ignored, ignored + bytes) is private to its threads.
void begin_launch(const void* ignored, size_t bytes);
void end_launch();

// A block begins, unordered with all others.
void begin_block(unsigned threads);

// From now on accesses are those of this thread of the block; of the host for kHost.
constexpr unsigned kHost = ~0u;
void now_runs(unsigned thread);

// All threads of the block met.
void order_block();

// The lanes of the warp that begins with this thread met in __syncwarp.
void order_lanes(unsigned first_thread, unsigned lanes);

// A shared array of the block that begins: nobody wrote it.
void new_shared_array(const void* array, size_t bytes);

// Bytes of [first, first + bytes) that threads read and wrote since it was watched.
struct Traffic {
  uintptr_t first, end;
  int64_t read = 0, written = 0;
};
extern std::vector<Traffic> watched;

// "(x, y, z)".
std::string numbers(const Index& index);

// Where code is, as "file:line" if the debug information says so.
std::string place(const void* code);

}  // namespace cuda_emulator::races
