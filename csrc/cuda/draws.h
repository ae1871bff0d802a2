// Draws of class ids on a device: what the launches of draws.cu take.
//
// Pointers are of the device and stay the caller's; a launch is put on `stream` and nothing is
// waited for.
#pragma once

#include "cuda/device.h"
#include "sampling.h"

namespace lossops {

// ids[t] = draw(t) for t < num.
void draw(const Permutation& draw, int64_t num, int64_t* ids, cudaStream_t stream);
void draw(const UniformDraw& draw, int64_t num, int64_t* ids, cudaStream_t stream);
void draw(const LogUniformDraw& draw, int64_t num, int64_t* ids, cudaStream_t stream);
void draw(const AliasDraw& draw, int64_t num, int64_t* ids, cudaStream_t stream);

// first[t]: whether draw t is the first of its id; `sorted` (num,) are the draws in rising order
// and `order` (num,) which draw each is, equal ids by number.
void mark_first(const int64_t* sorted, const int64_t* order, int64_t num, bool* first,
                cudaStream_t stream);

// ids (wanted,): the first `wanted` distinct of the draws (num,), in their order; `rank` counts the
// first ones up to each draw. `tries`: how many draws that took; as it was where they do not do.
struct TakeFirst {
  const int64_t* draws;
  const bool* first;
  const int64_t* rank;
  int64_t num, wanted;
  int64_t *ids, *tries;
};

void take_first(const TakeFirst& a, cudaStream_t stream);

// found[i]: where in the rising ids (num,) wanted[i] stands first, -1 where it does not.
void find_positions(const int64_t* ids, int64_t num, const int64_t* wanted, int64_t count,
                    int64_t* found, cudaStream_t stream);

// hit[n, s]: whether drawn[n, s] is one of target[n, :].
struct FindHits {
  const int64_t* drawn;   // (rows, num)
  const int64_t* target;  // (rows, per_row)
  int64_t rows, num, per_row;
  bool* hit;  // (rows, num)
};

void find_hits(const FindHits& a, cudaStream_t stream);

}  // namespace lossops
