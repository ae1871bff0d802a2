// Draws against the same arithmetic in a loop, distinct ones against a set, look-ups.
#include "cuda/draws.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <vector>

#include "program.h"

using namespace lossops;
using program::Buffer;
using program::expect;

template <typename Draw>
void check_draw(const Draw& one, int64_t num) {
  Buffer<int64_t> ids(num);
  draw(one, num, ids.data(), nullptr);
  for (int64_t t = 0; t < num; ++t) expect(ids[t] == int64_t(one(t)), "a draw");
}

void check_distinct(int64_t num, int64_t wanted) {
  Buffer<int64_t> draws(num), sorted(num), order(num), rank(num), ids(wanted, 0), tries(1);
  Buffer<bool> first(num);
  draw(LogUniformDraw{7, 60, std::log2(61.0)}, num, draws.data(), nullptr);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return draws[a] < draws[b]; });
  for (int64_t j = 0; j < num; ++j) sorted[j] = draws[order[j]];
  mark_first(sorted.data(), order.data(), num, first.data(), nullptr);
  for (int64_t t = 0; t < num; ++t) rank[t] = first[t] + (t > 0 ? rank[t - 1] : 0);
  take_first({draws.data(), first.data(), rank.data(), num, wanted, ids.data(), tries.data()},
             nullptr);
  std::set<int64_t> seen;
  std::vector<int64_t> expected;
  int64_t taken = -1;
  for (int64_t t = 0; t < num && taken < 0; ++t) {
    if (seen.insert(draws[t]).second) expected.push_back(draws[t]);
    if (int64_t(expected.size()) == wanted) taken = t + 1;
  }
  expected.resize(wanted);
  expect(tries[0] == taken, "tries");
  expect(std::equal(ids.begin(), ids.end(), expected.begin()), "distinct ids");
}

void check_positions(int64_t num, int64_t count) {
  Buffer<int64_t> ids(num), wanted(count), found(count);
  program::fill_ids(ids, 50);
  std::sort(ids.begin(), ids.end());
  program::fill_ids(wanted, 60);
  find_positions(ids.data(), num, wanted.data(), count, found.data(), nullptr);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* at = std::find(ids.begin(), ids.end(), wanted[i]);
    expect(found[i] == (at == ids.end() ? -1 : at - ids.begin()), "a position");
  }
}

void check_hits(int64_t rows, int64_t num, int64_t per_row) {
  Buffer<int64_t> drawn(rows * num), target(rows * per_row);
  Buffer<bool> hit(rows * num);
  program::fill_ids(drawn, 9);
  program::fill_ids(target, 9);
  find_hits({drawn.data(), target.data(), rows, num, per_row, hit.data()}, nullptr);
  for (int64_t i = 0; i < rows * num; ++i) {
    const int64_t* of_row = target.data() + i / num * per_row;
    expect(hit[i] == (std::find(of_row, of_row + per_row, drawn[i]) != of_row + per_row), "a hit");
  }
}

void check(unsigned seed, const std::string&) {
  check_draw(Permutation(seed, 300), 300);
  check_draw(Permutation(seed, (uint64_t(1) << 33) + 5), 257);
  check_draw(UniformDraw{seed, int64_t(1) << 40}, 3);
  check_draw(LogUniformDraw{seed, 1000, std::log2(1001.0)}, 256);
  Buffer<double> threshold(3, 0.5);
  Buffer<int64_t> alias(3, 1);
  check_draw(AliasDraw{seed, 3, threshold.data(), alias.data()}, 100);
  check_distinct(400, 40);
  check_distinct(30, 29);
  check_positions(100, 70);
  check_positions(0, 5);
  check_hits(7, 40, 3);
  check_hits(3, 5, 0);
}
