// Launchers of the kernels on logits that exist: statistics.cu, gradient.cu, columns.cu.
//
// Pointers are to device memory, null for what a call does not have. Nothing waits for the device.
#pragma once

#include "cuda/device.h"
#include "cuda/state.h"

namespace lossops {

// Products r (rows, classes) in memory and the map from them to logits:
// z = softcap · tanh((scale r + b) / softcap), without the softcap where it is 0.
struct Logits {
  const void* r;
  Dtype dtype;
  int64_t stride;  // elements from row to row
  int64_t rows;
  int classes;
  const float* scale;  // ()
  const float* b;      // (classes,)
  float softcap;
};

// What else a row has.
struct Sides {
  const int64_t* targets;  // (rows, num_targets), -1 for none
  int num_targets;
  const float* class_vector;  // (classes,)
  const void* teacher;        // (rows, classes)
  Dtype teacher_dtype;
  int64_t teacher_stride;
};

// Rows of `values` (kValueRows + log sums, rows) and of `ids` (3, rows); what is not in `kept` is
// left as it was. Relative to the row's shift, as lossops/statistics.py has it.
enum ValueRow {
  kShift,
  kLseRow,
  kMeanRow,
  kVarianceRow,
  kMaxRow,
  kRunnerUpRow,
  kBelowTargetRow,
  kAverageRow,
  kMomentRow,
  kSoftplusRow,
  kStableSumRow,
  kWeightedSumRow,
  kTeacherRow,
  kValueRows,
};

struct StatisticsCall {
  Logits logits;
  Sides sides;
  LogSums log_sums;
  unsigned kept;
  int parts;  // blocks that share a row; above 1 `states` (parts, words, rows) holds what they find
  float* states;
  float* values;
  int64_t* ids;
  float* at_target;  // (rows, num_targets): z there, -inf for none
};

// 32-bit words that a part leaves of a row, for the smallest compiled set that holds `kept`.
int state_words(Dtype dtype, unsigned kept);

void logits_statistics(const StatisticsCall& call, cudaStream_t stream);

// Why kernels cannot run on the current device: its driver is too old, or the library has no code
// for it. Launches nothing.
cudaError_t why_no_kernels();

// Statistics and coefficients of a gradient, each (rows,).
struct GradientRows {
  const float *shift, *lse, *mean, *variance, *average;
  const float *c_lse, *c_mean, *c_variance, *c_softplus, *c_stable, *c_average, *c_moment,
      *c_vector, *c_teacher;
  // max, runner up, below target
  const int64_t* extreme[3];
  const float* c_extreme[3];
};

constexpr int kMostSlopes = 16;

struct LogSumSlopes {
  int count = 0;
  float temperature[kMostSlopes] = {};
  float limit[kMostSlopes] = {};
  const float* lse[kMostSlopes] = {};
  const float* coefficient[kMostSlopes] = {};
};

// dr of the classes first_class + [0, classes) of num_classes; at the targets 0, or `at_target`.
struct GradientCall {
  Logits logits;
  Sides sides;
  GradientRows rows;
  LogSumSlopes log_sums;
  unsigned terms;  // of row.h, those with a coefficient
  int64_t first_class, num_classes;
  const float* at_target;  // (rows, num_targets)
  const float* unit;       // (): what dr is multiplied by
  void* out;               // (rows, classes), `logits.r` itself, or another matrix
  Dtype out_dtype;
  int64_t out_stride;
  int parts;  // blocks that share a row; 1 where half precision goes over the products
};

void logits_gradient(const GradientCall& call, cudaStream_t stream);

// db (parts, classes) = Σ over the rows of a part of dr as it is before it is rounded, or += it.
struct ColumnsCall {
  GradientCall gradient;
  float* db;
  bool accumulate;
  int parts = 1;  // of the rows, one after the other
};

void column_sums(const ColumnsCall& call, cudaStream_t stream);

}  // namespace lossops
