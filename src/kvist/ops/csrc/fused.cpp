// Few rows: all threads share each product. Many rows: each thread takes some of them through everything, in chunks that
// its second-level cache holds. The bits are the same.
#include "fused.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "parallel.h"
#include "vec.h"

namespace kvist {
namespace {

constexpr int64_t kMost = 96, kLeast = 12;  // rows of a chunk

// f(first, count) for chunks of rows, which threads take in turn where every one gets a fair part; they become smaller,
// so that all are done at nearly the same time.
template <class F>
void in_chunks(int64_t rows, F f) {
  const int64_t threads = thread_count();
  if (rows < 8 * threads) {
    for (int64_t first = 0; first < rows; first += kMost) f(first, std::min(kMost, rows - first));
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    for (int64_t first = next; first < rows;) {
      const int64_t left = rows - first, fair = left / (2 * threads) / kLeast * kLeast;
      const int64_t count = std::min(left, std::clamp(fair, kLeast, kMost));
      if (!next.compare_exchange_weak(first, first + count)) continue;
      f(first, count);
      first = next;
    }
  });
}

// Rows of x, normed where there is a norm, as the product takes them.
void code_rows(const Norm& norm, const float* x, int64_t rows, const Packed& weight, const Coded& coded) {
  const int64_t size = weight.columns;
  const Buffer<float> normed = make_buffer<float>(norm.weight ? size : 0);
  for (int64_t row = 0; row < rows; row++) {
    const float* from = x + row * size;
    if (norm.weight) {
      rms_norm_row(from, norm.weight, norm.eps, size, normed.get());
      from = normed.get();
    }
    code_row(from, size, weight.group, 0, row, coded);
  }
}

void rotate(float* head, const float* cos, const float* sin, int64_t rotated) {
  const int64_t half = rotated / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t left = half - i;
    const Vec first = load_first(head + i, left), second = load_first(head + half + i, left);
    const Vec a = first * load_first(cos + i, left) - second * load_first(sin + i, left);
    const Vec b = second * load_first(cos + half + i, left) + first * load_first(sin + half + i, left);
    store_first(head + i, a, left);
    store_first(head + half + i, b, left);
  }
}

void finish_heads(const Projection& p, int64_t row, float* heads) {
  for (int64_t head = 0; head < p.query_heads + p.key_heads; head++, heads += p.head_dim) {
    const Norm& norm = head < p.query_heads ? p.query_norm : p.key_norm;
    if (norm.weight) rms_norm_row(heads, norm.weight, norm.eps, p.head_dim, heads);
    if (p.cos) rotate(heads, p.cos + row * p.rotated, p.sin + row * p.rotated, p.rotated);
  }
}

// out = x + norm(added), row by row; in place where they are the same.
void add_normed(const Norm& norm, const float* x, float* added, int64_t rows, int64_t size, float* out) {
  for (int64_t row = 0; row < rows; row++, x += size, added += size, out += size) {
    rms_norm_row(added, norm.weight, norm.eps, size, added);
    for (int64_t i = 0; i < size; i += kLanes)
      store_first(out + i, load_first(x + i, size - i) + load_first(added + i, size - i), size - i);
  }
}

// result = x + norm(weight * coded + bias), or without a norm.
void add_product(const Packed& weight, const float* bias, const Norm& norm, const Coded& coded, const float* x,
                 int64_t rows, float* result) {
  const int64_t size = weight.rows;
  if (!norm.weight) return multiply(weight, coded, rows, {bias, x, result, size});
  const Buffer<float> added = make_buffer<float>(rows * size);
  multiply(weight, coded, rows, {bias, nullptr, added.get(), size});
  add_normed(norm, x, added.get(), rows, size, result);
}

}  // namespace

void linear(const Norm& norm, const Packed& weight, const float* bias, const float* x, int64_t rows, float* out) {
  in_chunks(rows, [&](int64_t first, int64_t count) {
    const Coded coded(count, weight.width(), weight.groups());
    code_rows(norm, x + first * weight.columns, count, weight, coded);
    multiply(weight, coded, count, {bias, nullptr, out + first * weight.rows, weight.rows});
  });
}

void project(const Projection& p, const float* x, int64_t rows, float* out) {
  in_chunks(rows, [&](int64_t first, int64_t count) {
    const Coded coded(count, p.weight.width(), p.weight.groups());
    code_rows(p.norm, x + first * p.weight.columns, count, p.weight, coded);
    multiply(p.weight, coded, count, {p.bias, nullptr, out + first * p.weight.rows, p.weight.rows});
    for (int64_t row = first; row < first + count; row++) finish_heads(p, row, out + row * p.weight.rows);
  });
}

void end_layer(const Ending& e, const float* x, const float* attended, int64_t rows, float* result) {
  const int64_t size = e.out.rows;
  in_chunks(rows, [&](int64_t first, int64_t count) {
    float* mine = result + first * size;
    {
      const Coded coded(count, e.out.width(), e.out.groups());
      code_rows({nullptr, 0}, attended + first * e.out.columns, count, e.out, coded);
      add_product(e.out, e.out_bias, e.out_norm, coded, x + first * size, count, mine);
    }
    const Coded coded(count, e.gate_up.width(), e.gate_up.groups());
    const Coded gated(count, e.down.width(), e.down.groups());
    code_rows(e.norm, mine, count, e.gate_up, coded);
    multiply_gated(e.gate_up, coded, count, e.gate, e.down.group, gated);
    add_product(e.down, nullptr, e.down_norm, gated, mine, count, mine);
  });
}

}  // namespace kvist
