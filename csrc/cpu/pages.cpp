#include "cpu/pages.h"

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lossops {

void prefer_huge_pages(const at::Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const auto& storage = tensor.storage();
  const auto start = reinterpret_cast<uintptr_t>(storage.data());
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t end = (start + storage.nbytes()) / kPage * kPage;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  static_cast<void>(tensor);
#endif
}

}  // namespace lossops
