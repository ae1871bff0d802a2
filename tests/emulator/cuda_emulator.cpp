// The engine: fibers, the order in which they run, and what they wait for.
#include "cuda_emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "race_detector.h"

#if defined(__x86_64__) && defined(__linux__)
#define OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

#ifdef LOSSOPS_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef OWN_SWITCH
// Saves the registers that a call preserves on the stack it leaves, and takes those of the other.
// swapcontext also asks the kernel for the signal mask, twice, which is all of its cost.
extern "C" void cuda_emulator_switch(void** leave, void* enter);
asm(R"(
.text
.type cuda_emulator_switch, @function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch, .-cuda_emulator_switch
)");
#endif

namespace cuda_emulator {

Position position;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10, kGuard = 4096, kMaxShared = 48 << 10, kMaxAlignment = 128;

// AddressSanitizer must be told of every switch of stacks; the engine itself needs no checks.
namespace sanitizer {
#ifdef LOSSOPS_ADDRESS_SANITIZER
// `fake` keeps what the stack that is left has on the heap; null if it ends.
void leave(void** fake, const void* for_stack, size_t bytes) {
  __sanitizer_start_switch_fiber(fake, for_stack, bytes);
}
void arrive(void* fake, const void** from_stack, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake, from_stack, bytes);
}
void poison(void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
void unpoison(void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
void leave(void**, const void*, size_t) {}
void arrive(void*, const void**, size_t*) {}
void poison(void*, size_t) {}
void unpoison(void*, size_t) {}
#endif
}  // namespace sanitizer

// A stack that runs, or where one stopped.
class Context {
 public:
#ifdef OWN_SWITCH
  // The first switch here calls entry, which never returns, as if from an aligned stack.
  void prepare(char*, char* top, void (*entry)()) {
    void** frame = reinterpret_cast<void**>(top) - 8;
    std::fill(frame, frame + 8, nullptr);
    frame[6] = reinterpret_cast<void*>(entry);
    at_ = frame;
  }
  void switch_to(Context& other) { cuda_emulator_switch(&at_, other.at_); }

 private:
  void* at_ = nullptr;
#else
  void prepare(char* stack, char* top, void (*entry)()) {
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack;
    at_.uc_stack.ss_size = static_cast<size_t>(top - stack);
    at_.uc_link = nullptr;
    makecontext(&at_, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&at_, &other.at_); }

 private:
  ucontext_t at_;
#endif
};

enum class Waits { kNot, kForBlock, kForWarp, kEnded };

struct Fiber {
  Context context;
  char *stack, *top;
  unsigned number;
  Index thread;
  Waits waits;
  // Of the wait: for reports, and for what its warp does together.
  const char* name;
  const void* code;
  Together together;
  unsigned mask;
  int source;
  size_t bytes;
  alignas(16) std::array<unsigned char, 16> value, result;
};

struct SharedArray {
  const void* site;
  void* memory;
  char* first;
  size_t bytes;
  bool of_this_block;
};

// All of the emulator: one launch at a time, of one kernel.
struct State {
  const char* kernel;
  void (*body)(void*);
  void* argument;
  char* stacks = nullptr;
  std::vector<Fiber> fibers;  // (block size,)
  std::vector<unsigned> order;
  std::vector<SharedArray> shared;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  Fiber* running = nullptr;
  std::string fault;
  unsigned seed = 0;
  int launches = 0;
  std::minstd_rand draw;
  cudaError_t last_error = cudaSuccess;
};
State state;
std::mutex one_launch;

// Not to come back, if the running fiber `ends`.
void to_scheduler(bool ends) {
  void* fake = nullptr;
  sanitizer::leave(ends ? nullptr : &fake, state.scheduler_stack, state.scheduler_stack_bytes);
  state.running->context.switch_to(state.scheduler);
  sanitizer::arrive(fake, &state.scheduler_stack, &state.scheduler_stack_bytes);
}

void fiber_main() {
  sanitizer::arrive(nullptr, &state.scheduler_stack, &state.scheduler_stack_bytes);
  state.body(state.argument);
  state.running->waits = Waits::kEnded;
  to_scheduler(true);
}

void resume(Fiber& fiber) {
  state.running = &fiber;
  position.thread = fiber.thread;
  races::now_runs(fiber.number);
  void* fake = nullptr;
  sanitizer::leave(&fake, fiber.stack, kStack - kGuard);
  state.scheduler.switch_to(fiber.context);
  sanitizer::arrive(fake, nullptr, nullptr);
  races::now_runs(races::kHost);
  state.running = nullptr;
}

void set_fault(const Fiber& fiber, const void* code, const std::string& what) {
  std::string kernel = state.kernel;
  if (kernel[0] == '(') kernel = kernel.substr(1, kernel.size() - 2);
  state.fault = "kernel " + kernel + ", block " + races::numbers(position.block) + ", thread " +
                races::numbers(fiber.thread) + ", at " + races::place(code) + ": " + what;
}

unsigned count(Waits waits) {
  return static_cast<unsigned>(std::count_if(state.fibers.begin(), state.fibers.end(),
                                             [&](const Fiber& f) { return f.waits == waits; }));
}

// The running thread waits, until the scheduler or another thread says that it need not.
void wait(Waits waits, const char* name, const void* code) {
  Fiber& fiber = *state.running;
  fiber.waits = waits;
  fiber.name = name;
  fiber.code = code;
}

// The lanes of this lane's warp that are still there.
unsigned living_lanes(const Fiber* warp, unsigned lanes) {
  unsigned living = 0;
  for (unsigned l = 0; l < lanes; ++l) living |= (warp[l].waits != Waits::kEnded) << l;
  return living;
}

// Carries out what these lanes do together, which all of them wait for.
void meet(Fiber* warp, unsigned lanes) {
  unsigned votes = 0;
  for (unsigned l = 0; l < kWarp; ++l)
    if (lanes >> l & 1) votes |= unsigned{warp[l].value[0] != 0} << l;
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!(lanes >> l & 1)) continue;
    Fiber& fiber = warp[l];
    if (fiber.together == Together::kShuffle) {
      if (!(lanes >> fiber.source & 1)) {
        set_fault(fiber, fiber.code,
                  fiber.name + std::string(" takes the value of lane ") +
                      std::to_string(fiber.source) + ", which is not among those that meet");
        return;
      }
      fiber.result = warp[fiber.source].value;
    }
    if (fiber.together == Together::kVote) std::memcpy(fiber.result.data(), &votes, sizeof(votes));
    fiber.waits = Waits::kNot;
  }
  if (warp[std::countr_zero(lanes)].together == Together::kOrder)
    races::order_lanes(warp->number, lanes);
}

// Whether the lanes that this one waits for have come, to do the same thing; they have met then.
bool try_to_meet(Fiber& fiber) {
  const unsigned first = fiber.number / kWarp * kWarp;
  const unsigned lanes = std::min(kWarp, static_cast<unsigned>(state.fibers.size()) - first);
  Fiber* const warp = &state.fibers[first];
  const unsigned met = fiber.mask & living_lanes(warp, lanes);
  for (unsigned l = 0; l < lanes; ++l) {
    if (!(met >> l & 1)) continue;
    const Fiber& other = warp[l];
    if (other.waits != Waits::kForWarp || other.mask != fiber.mask || other.name != fiber.name ||
        other.bytes != fiber.bytes)
      return false;
  }
  meet(warp, met);
  return true;
}

bool release_warps() {
  bool any = false;
  for (Fiber& fiber : state.fibers)
    if (fiber.waits == Waits::kForWarp) any |= try_to_meet(fiber);
  return any;
}

bool release_block() {
  const auto threads = static_cast<unsigned>(state.fibers.size());
  if (count(Waits::kForBlock) < threads) return false;
  for (Fiber& fiber : state.fibers) fiber.waits = Waits::kNot;
  races::order_block();
  return true;
}

// Nobody can go on.
void report_divergence() {
  for (const Fiber& fiber : state.fibers) {
    if (fiber.waits == Waits::kEnded) continue;
    unsigned here = 0;
    for (const Fiber& other : state.fibers)
      here += other.waits == fiber.waits && other.name == fiber.name;
    set_fault(fiber, fiber.code,
              "waits for ever in " + std::string(fiber.name) + ", which " + std::to_string(here) +
                  " of " + std::to_string(state.fibers.size()) + " threads reach");
    return;
  }
}

void check_fault() {
  if (state.fault.empty()) return;
  sanitizer::unpoison(state.stacks, kMaxThreads * kStack);  // frames that never returned
  throw std::runtime_error(state.fault);
}

void run_ready_threads() {
  if (state.seed != 0) std::shuffle(state.order.begin(), state.order.end(), state.draw);
  for (unsigned number : state.order) {
    Fiber& fiber = state.fibers[number];
    if (fiber.waits != Waits::kNot) continue;
    resume(fiber);
    check_fault();
  }
}

void run_block() {
  races::begin_block(static_cast<unsigned>(state.fibers.size()));
  for (SharedArray& array : state.shared) array.of_this_block = false;
  for (Fiber& fiber : state.fibers) {
    fiber.waits = Waits::kNot;
    fiber.context.prepare(fiber.stack, fiber.top, fiber_main);
  }
  while (count(Waits::kEnded) < state.fibers.size()) {
    run_ready_threads();
    if (count(Waits::kNot) > 0 || count(Waits::kEnded) == state.fibers.size()) continue;
    if (!release_block() && !release_warps()) report_divergence();
    check_fault();
  }
}

// One mapping, so that one comparison tells a stack; pages that nobody touches cost nothing.
void map_stacks() {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const mapped = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapped == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the threads");
  state.stacks = static_cast<char*>(mapped);
  for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(state.stacks + i * kStack, kGuard, PROT_NONE);
}

void make_fibers(const Index& block) {
  if (state.stacks == nullptr) map_stacks();
  state.fibers.resize(block.x * block.y * block.z);
  state.order.resize(state.fibers.size());
  std::iota(state.order.begin(), state.order.end(), 0u);
  for (unsigned i = 0; i < state.fibers.size(); ++i) {
    Fiber& fiber = state.fibers[i];
    fiber.number = i;
    fiber.thread = {{i % block.x}, {i / block.x % block.y}, {i / block.x / block.y}};
    fiber.stack = state.stacks + i * kStack + kGuard;
    // Tops at one offset from a page would fall on the same few lines of the cache.
    fiber.top = fiber.stack + kStack - kGuard - i * 192 % 4096;
  }
}

bool fits(const Size& grid, const Size& block) {
  auto within = [](const Size& size, int64_t x, int64_t y, int64_t z) {
    return 1 <= size.x && size.x <= x && 1 <= size.y && size.y <= y && 1 <= size.z && size.z <= z;
  };
  return within(grid, 2147483647, 65535, 65535) && within(block, 1024, 1024, 64) &&
         block.x * block.y * block.z <= kMaxThreads;
}

Index to_index(const Size& size) {
  return {{static_cast<unsigned>(size.x)},
          {static_cast<unsigned>(size.y)},
          {static_cast<unsigned>(size.z)}};
}

// Gives back what a launch took, whether it ends or fails.
struct EndOfLaunch {
  ~EndOfLaunch() {
    for (SharedArray& array : state.shared) free(array.memory);
    state.shared.clear();
    state.running = nullptr;
    state.fault.clear();
    races::end_launch();
  }
};

}  // namespace

void run(const char* kernel, Size grid, Size block, void (*body)(void*), void* argument) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (!fits(grid, block)) {
    state.last_error = cudaErrorInvalidConfiguration;
    return;
  }
  const EndOfLaunch end;
  ++state.launches;
  state.kernel = kernel;
  state.body = body;
  state.argument = argument;
  state.draw.seed(state.seed);
  position.grid_dim = to_index(grid);
  position.block_dim = to_index(block);
  make_fibers(position.block_dim);
  races::begin_launch(state.stacks, kMaxThreads * kStack);
  std::vector<int64_t> blocks(static_cast<size_t>(grid.x * grid.y * grid.z));
  std::iota(blocks.begin(), blocks.end(), int64_t{0});
  if (state.seed != 0) std::shuffle(blocks.begin(), blocks.end(), state.draw);
  for (int64_t b : blocks) {
    position.block =
        to_index(dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                      static_cast<unsigned>(b / grid.x / grid.y)));
    run_block();
  }
}

void fail_at(const void* code, const std::string& what) {
  set_fault(*state.running, code, what);
  to_scheduler(true);
  abort();
}

void fail(const char* what) { fail_at(__builtin_return_address(0), what); }

void* shared_array(const void* site, size_t bytes, size_t alignment) {
  auto array = std::find_if(state.shared.begin(), state.shared.end(),
                            [&](const SharedArray& a) { return a.site == site; });
  if (array == state.shared.end()) {
    size_t all = bytes;
    for (const SharedArray& each : state.shared) all += each.bytes;
    if (all > kMaxShared)
      fail_at(__builtin_return_address(0), "its shared arrays have " + std::to_string(all) +
                                               " bytes, more than " + std::to_string(kMaxShared));
    void* memory = nullptr;
    if (posix_memalign(&memory, kMaxAlignment, alignment + bytes) != 0) abort();
    state.shared.push_back({site, memory, static_cast<char*>(memory) + alignment, bytes, false});
    sanitizer::poison(memory, alignment);
    array = state.shared.end() - 1;
  }
  if (!array->of_this_block) {
    std::memset(array->first, 0xff, bytes);
    races::new_shared_array(array->first, bytes);
    array->of_this_block = true;
  }
  return array->first;
}

void block_barrier() {
  wait(Waits::kForBlock, "__syncthreads", __builtin_return_address(0));
  to_scheduler(false);
}

void warp_meeting(Together together, const char* name, unsigned mask, void* value, size_t bytes,
                  int source) {
  Fiber& fiber = *state.running;
  if (!(mask >> (fiber.number % kWarp) & 1))
    fail_at(__builtin_return_address(0), std::string(name) + " by lane " +
                                             std::to_string(fiber.number % kWarp) +
                                             ", which is not in its mask");
  fiber.together = together;
  fiber.mask = mask;
  fiber.source = source;
  fiber.bytes = bytes;
  if (bytes > 0) std::memcpy(fiber.value.data(), value, bytes);
  wait(Waits::kForWarp, name, __builtin_return_address(0));
  // The last to come need not leave.
  if (!try_to_meet(fiber) || !state.fault.empty()) to_scheduler(false);
  if (bytes > 0) std::memcpy(value, fiber.result.data(), bytes);
}

int lane() { return static_cast<int>(state.running->number % kWarp); }

void set_seed(unsigned seed) { state.seed = seed; }

}  // namespace cuda_emulator

cudaError_t cudaGetLastError() {
  return std::exchange(cuda_emulator::state.last_error, cudaSuccess);
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

// For Python, by ctypes.
extern "C" {
#define FOR_PYTHON __attribute__((visibility("default")))

FOR_PYTHON void lossops_emulator_seed(unsigned seed) { cuda_emulator::set_seed(seed); }

FOR_PYTHON int lossops_emulator_launches() { return cuda_emulator::state.launches; }

// Count the bytes that move to and from memory from now on; those at `first` are number 0, 1, ...
FOR_PYTHON void lossops_emulator_watch(uintptr_t first, uintptr_t bytes) {
  cuda_emulator::races::watched.push_back({first, first + bytes});
}
FOR_PYTHON int64_t lossops_emulator_bytes_read(int number) {
  return cuda_emulator::races::watched[number].read;
}
FOR_PYTHON int64_t lossops_emulator_bytes_written(int number) {
  return cuda_emulator::races::watched[number].written;
}
FOR_PYTHON void lossops_emulator_watch_nothing() { cuda_emulator::races::watched.clear(); }

#undef FOR_PYTHON
}  // extern "C"
