// The primitives but for the draws as one translation unit: of the time of a file by itself more
// than half goes into torch's headers, which are parsed here once. On one core 15 s for each
// capability, against 42 s in nine files.
#include "cpu/far.cpp"
#include "cpu/half.cpp"
#include "cpu/linear.cpp"
#include "cpu/logits.cpp"
#include "cpu/pairs.cpp"
#include "cpu/products.cpp"
#include "cpu/rows.cpp"
#include "cpu/targets.cpp"
#include "cpu/task.cpp"
