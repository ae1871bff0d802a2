// An access is a fault if nothing orders it after an earlier one of another thread to the same
// bytes, and either writes. The compiler reports accesses: with -fsanitize=thread it calls
// __tsan_read4 and its like, which are defined here in the place of its own runtime. That one knows
// threads and locks, forgets old accesses, and has too few thread numbers for a fiber of every
// thread of a grid; what orders the threads of a kernel is simple enough to be decided exactly:
//
//   two blocks              nothing
//   two threads of a block  a __syncthreads between, or in one warp a __syncwarp of both lanes
//
// Shuffles and votes order nothing: CUDA does not promise it. The time of a thread is divided into
// segments, which end where it is ordered with others, and each cell of memory remembers the
// segments of its last write and of the reads since.
#include "race_detector.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <unordered_map>
#include <vector>

namespace cuda_emulator::races {

std::vector<Traffic> watched;

namespace {

struct Segment {
  uint32_t block, barriers, time;
  uint32_t thread;
};

// The segment's number, 0 for none, and where its code is, from `anchor`: 32 bits, for there are
// many of these.
struct Access {
  uint32_t segment = 0;
  int32_t code = 0;
};
const char anchor = 0;

// Two reads are enough: of warps that differ, if there are such. A write races with any other read,
// and is of one warp only.
struct Cell {
  Access write, reads[2];
};

// A piece of memory in units as small as its smallest access.
struct Page {
  static constexpr uintptr_t kBytes = 256;
  uintptr_t unit = 8;
  std::vector<Cell> cells = std::vector<Cell>(kBytes / 8);

  void refine(uintptr_t bounds) {
    const uintptr_t smaller = bounds & -bounds;
    if (smaller >= unit) return;
    std::vector<Cell> finer(kBytes / smaller);
    for (size_t i = 0; i < finer.size(); ++i) finer[i] = cells[i * smaller / unit];
    cells.swap(finer);
    unit = smaller;
  }
};

struct Thread {
  uint32_t segment = 0;
  // Up to which time of each lane of the warp this thread comes after it.
  std::array<uint32_t, kWarp> after{};
};

struct Array {
  uintptr_t first, end;
};

struct State {
  uintptr_t ignored, ignored_end;
  std::unordered_map<uintptr_t, Page> pages;
  std::array<std::pair<uintptr_t, Page*>, 256> recent_pages;
  std::vector<Segment> segments;
  std::vector<Index> blocks;
  std::vector<Thread> threads;
  std::vector<Array> shared;
  uint32_t barriers;
};
State state;
unsigned running = kHost;

uint32_t current_segment() {
  Thread& thread = state.threads[running];
  if (thread.segment == 0) {
    const auto block = static_cast<uint32_t>(state.blocks.size() - 1);
    thread.segment = static_cast<uint32_t>(state.segments.size());
    state.segments.push_back({block, state.barriers, thread.after[running % kWarp], running});
  }
  return thread.segment;
}

// Whether the running thread comes after that segment, or is its thread.
bool comes_after(const Segment& s) {
  if (s.block + 1 != state.blocks.size()) return false;
  if (s.barriers < state.barriers || s.thread == running) return true;
  return s.thread / kWarp == running / kWarp &&
         s.time <= state.threads[running].after[s.thread % kWarp];
}

bool same_warp(const Segment& a, const Segment& b) {
  return a.block == b.block && a.thread / kWarp == b.thread / kWarp;
}

std::string thread_numbers(unsigned thread) {
  const Index& size = position.block_dim;
  return numbers({{thread % size.x}, {thread / size.x % size.y}, {thread / size.x / size.y}});
}

[[noreturn]] void fail_race(const char* does, const Access& now, const char* did, Access before) {
  const Segment& s = state.segments[before.segment];
  fail_at(&anchor + now.code, "race: " + std::string(does) + " what thread " +
                                  thread_numbers(s.thread) + " of block " +
                                  numbers(state.blocks[s.block]) + " " + did + " at " +
                                  place(&anchor + before.code) + ", and nothing orders the two");
}

void check_order(const char* does, const Access& now, const char* did, const Access& before) {
  if (before.segment == 0 || before.segment == now.segment) return;
  if (!comes_after(state.segments[before.segment])) fail_race(does, now, did, before);
}

void write(Cell& cell, const Access& now) {
  check_order("writes", now, "wrote", cell.write);
  for (Access& read : cell.reads) check_order("writes", now, "read", read);
  cell = {now, {}};
}

void remember_read(Cell& cell, const Access& now) {
  auto replaceable = [](const Access& read) {
    return read.segment == 0 || comes_after(state.segments[read.segment]);
  };
  for (Access& read : cell.reads) {
    if (replaceable(read)) {
      read = now;
      return;
    }
  }
  const auto [a, b] = cell.reads;
  if (same_warp(state.segments[a.segment], state.segments[b.segment])) cell.reads[1] = now;
}

bool is_shared(uintptr_t address) {
  return std::any_of(state.shared.begin(), state.shared.end(),
                     [&](const Array& a) { return a.first <= address && address < a.end; });
}

void read(Cell& cell, uintptr_t address, const Access& now) {
  check_order("reads", now, "wrote", cell.write);
  if (cell.write.segment == 0 && is_shared(address))
    fail_at(&anchor + now.code, "reads shared memory that no thread of its block wrote");
  remember_read(cell, now);
}

Page& page_of(uintptr_t address) {
  const uintptr_t number = address / Page::kBytes;
  auto& [recent, page] = state.recent_pages[number % state.recent_pages.size()];
  if (page == nullptr || recent != number) {
    recent = number;
    page = &state.pages[number];
  }
  return *page;
}

void count_traffic(uintptr_t address, size_t bytes, bool writes) {
  for (Traffic& traffic : watched) {
    if (address < traffic.first || traffic.end <= address || is_shared(address)) continue;
    (writes ? traffic.written : traffic.read) += static_cast<int64_t>(bytes);
  }
}

template <typename F>
void for_each_cell(uintptr_t address, size_t bytes, F f) {
  for (const uintptr_t end = address + bytes; address < end;) {
    Page& page = page_of(address);
    const uintptr_t here = std::min(end, (address / Page::kBytes + 1) * Page::kBytes);
    page.refine(address | here);
    for (; address < here; address += page.unit)
      f(page.cells[address % Page::kBytes / page.unit], address);
  }
}

void touch(const void* pointer, size_t bytes, size_t alignment, bool writes, const void* code) {
  if (running == kHost) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (state.ignored <= address && address < state.ignored_end) return;
  if (address - reinterpret_cast<uintptr_t>(&position) < sizeof(position)) return;
  if (address % alignment != 0)
    fail_at(code, "accesses " + std::to_string(bytes) + " bytes at a misaligned address");
  if (!watched.empty()) count_traffic(address, bytes, writes);
  const Access now = {current_segment(),
                      static_cast<int32_t>(static_cast<const char*>(code) - &anchor)};
  for_each_cell(address, bytes, [&](Cell& cell, uintptr_t at) {
    if (writes) {
      if (cell.write.segment != now.segment || cell.reads[0].segment != 0) write(cell, now);
    } else {
      if (cell.reads[0].segment != now.segment) read(cell, at, now);
    }
  });
}

// "file:line", or nothing.
std::string line_of(const char* module, uintptr_t offset) {
  char number[32];
  snprintf(number, sizeof(number), "0x%zx", static_cast<size_t>(offset));
  const std::string command =
      "addr2line -i -e '" + std::string(module) + "' " + number + " 2>/dev/null";
  FILE* const lines = popen(command.c_str(), "r");
  if (lines == nullptr) return "";
  std::string found;
  // Innermost first; the emulator's own inline functions are not where a kernel errs.
  for (char buffer[1024]; fgets(buffer, sizeof(buffer), lines) != nullptr;) {
    std::string line = buffer;
    line = line.substr(line.rfind('/') + 1);
    if (found.empty() && line[0] != '?' && !line.starts_with("cuda_emulator.h"))
      found = line.substr(0, line.find_first_of(" \n"));
  }
  pclose(lines);
  return found;
}

}  // namespace

void begin_launch(const void* ignored, size_t bytes) {
  state = {};
  state.ignored = reinterpret_cast<uintptr_t>(ignored);
  state.ignored_end = state.ignored + bytes;
  state.segments.resize(1);  // 0 is none
}

void end_launch() {
  running = kHost;
  state = {};
}

void begin_block(unsigned threads) {
  state.blocks.push_back(position.block);
  state.threads.assign(threads, {});
  for (unsigned t = 0; t < threads; ++t) state.threads[t].after[t % kWarp] = 1;
  state.shared.clear();
  state.barriers = 0;
}

void now_runs(unsigned thread) { running = thread; }

void order_block() {
  ++state.barriers;
  for (Thread& thread : state.threads) thread.segment = 0;
}

void order_lanes(unsigned first_thread, unsigned lanes) {
  Thread* const warp = &state.threads[first_thread];
  std::array<uint32_t, kWarp> together{};
  auto for_each_lane = [&](auto f) {
    for (unsigned l = 0; l < kWarp; ++l)
      if (lanes >> l & 1) f(warp[l], l);
  };
  for_each_lane([&](Thread& thread, unsigned) {
    for (unsigned l = 0; l < kWarp; ++l) together[l] = std::max(together[l], thread.after[l]);
  });
  for_each_lane([&](Thread& thread, unsigned l) {
    thread.after = together;
    ++thread.after[l];
    thread.segment = 0;
  });
}

void new_shared_array(const void* array, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(array);
  state.shared.push_back({first, first + bytes});
  for_each_cell(first, bytes, [](Cell& cell, uintptr_t) { cell = {}; });
}

std::string numbers(const Index& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string place(const void* code) {
  Dl_info module{};
  if (dladdr(code, &module) == 0 || module.dli_fname == nullptr) return "an unknown place";
  // One less, for the code is where a call returns to.
  const auto offset =
      reinterpret_cast<uintptr_t>(code) - 1 - reinterpret_cast<uintptr_t>(module.dli_fbase);
  const std::string line = line_of(module.dli_fname, offset);
  return line.empty() ? module.dli_fname + ("+" + std::to_string(offset)) : line;
}

}  // namespace cuda_emulator::races

// What -fsanitize=thread calls.
extern "C" {

#define TOUCH(name, bytes, alignment, writes)                                              \
  void __tsan_##name(void* p) {                                                            \
    cuda_emulator::races::touch(p, bytes, alignment, writes, __builtin_return_address(0)); \
  }
#define ACCESSES(bytes, alignment)              \
  TOUCH(read##bytes, bytes, alignment, false)   \
  TOUCH(write##bytes, bytes, alignment, true)   \
  TOUCH(unaligned_read##bytes, bytes, 1, false) \
  TOUCH(unaligned_write##bytes, bytes, 1, true)
ACCESSES(1, 1)
ACCESSES(2, 2)
ACCESSES(4, 4)
ACCESSES(8, 8)
ACCESSES(16, 8)  // a pair of doubles is no vector
#undef ACCESSES
#undef TOUCH

void __tsan_read_range(void* p, size_t bytes) {
  cuda_emulator::races::touch(p, bytes, 1, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  cuda_emulator::races::touch(p, bytes, 1, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

}  // extern "C"
