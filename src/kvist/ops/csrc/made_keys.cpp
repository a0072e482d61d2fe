#include "made_keys.h"

#include <algorithm>

namespace kvist {
namespace {

constexpr int64_t kMaxKeyDim = 2 * kMaxHeadDim;
constexpr int kRowsAtOnce = 4;

// Each row's products in four chains, by the dimension's remainder, whatever stands beside it.
template <int kRows>
inline void multiply_rows(const float* rows, int64_t stride, const Lanes* keys, int64_t dims, float* out) {
  Vec total[kRows][4];
  KVIST_UNROLL for (int r = 0; r < kRows; r++) KVIST_UNROLL for (int c = 0; c < 4; c++) total[r][c] = zero();
  for (int64_t i = 0; i < dims; i += 4) {
    KVIST_UNROLL for (int c = 0; c < 4; c++) {
      const Vec key = load(keys[i + c]);
      KVIST_UNROLL for (int r = 0; r < kRows; r++)
        total[r][c] = fma(set1(rows[r * stride + i + c]), key, total[r][c]);
    }
  }
  KVIST_UNROLL for (int r = 0; r < kRows; r++)
    store(out + r * kScoreStride, (total[r][0] + total[r][1]) + (total[r][2] + total[r][3]));
}

void multiply(const float* rows, int64_t count, int64_t stride, const Lanes* keys, int64_t dims, float* out) {
  for (; count >= kRowsAtOnce; count -= kRowsAtOnce, rows += kRowsAtOnce * stride, out += kRowsAtOnce * kScoreStride)
    multiply_rows<kRowsAtOnce>(rows, stride, keys, dims, out);
  for (; count > 0; count--, rows += stride, out += kScoreStride) multiply_rows<1>(rows, stride, keys, dims, out);
}

std::optional<Vectors> vectors_behind(const AttendMadeCall& call) {
  if (!call.behind) return std::nullopt;
  return Vectors(*call.behind, true, call.batch.block_size, call.batch.key_dim - call.batch.head_dim);
}

}  // namespace

MadeKeys::MadeKeys(const AttendMadeCall& call)
    : batch_(call.batch),
      values_(call.values, false, call.batch.block_size, call.batch.head_dim),
      behind_(vectors_behind(call)),
      tie_(call.tie),
      width_(State(call.batch.key_dim).width) {}

void MadeKeys::load_queries(const Group& group, float* queries) const {
  batch_.each_row(group, [&](int64_t token, int64_t head, int64_t row) {
    with_type(batch_.q_type, [&](auto kind) {
      const auto* from = static_cast<const decltype(kind)*>(batch_.q) + token * batch_.q_stride + head * batch_.key_dim;
      for (int64_t i = 0; i < width_; i += kLanes)
        store(queries + row * width_ + i, load_first(from + i, batch_.key_dim - i));
    });
    const int64_t half = batch_.head_dim / 2;
    for (int64_t i = tie_ ? tie_->pairs : half; i < half; i++) {
      queries[row * width_ + i] *= tie_->weight[i];
      queries[row * width_ + i + half] *= tie_->weight[i + half];
    }
  });
  if (tie_ || !values_.coded()) return;
  for (int64_t head = 0; head < group.heads; head++)
    for (int64_t row = 0; row < group.rows; row += kLanes)
      enter(group.head + head, std::min<int64_t>(kLanes, group.rows - row), queries + (head * group.rows + row) * width_);
}

// Latents stay in their frame, and so queries enter it, sixteen at a time.
void MadeKeys::enter(int64_t head, int64_t count, float* queries) const {
  alignas(64) Lanes x[kMaxHeadDim];
  if (count < kLanes) std::fill_n(x[0], batch_.head_dim * kLanes, 0.0f);
  for (int64_t lane = 0; lane < count; lane++)
    for (int64_t i = 0; i < batch_.head_dim; i++) x[i][lane] = queries[lane * width_ + i];
  values_.enter(head, x);
  for (int64_t lane = 0; lane < count; lane++)
    for (int64_t i = 0; i < batch_.head_dim; i++) queries[lane * width_ + i] = x[i][lane];
}

void MadeKeys::score(const Split& split, int64_t head, const float* queries, float* scores, Fetcher&) const {
  const int64_t row = head * split.group.rows + split.first;
  alignas(64) Lanes keys[kMaxKeyDim];
  for (int64_t key = split.begin; key < split.seen(); key += kLanes) {
    make(split.group, head, split.start + key, keys);
    multiply(queries + row * width_, split.rows(), width_, keys, batch_.key_dim, scores + row * kScoreStride + key);
  }
}

// The keys of sixteen tokens from `token` on.
void MadeKeys::make(const Group& group, int64_t head, int64_t token, Lanes* keys) const {
  const int64_t index = group.head + head, id = batch_.block(group, token) * batch_.heads + index;
  const int64_t place = token % batch_.block_size;
  if (tie_) {
    values_.read(id, index, place, keys);
    tie(tie_->offsets[group.sequence] + token, keys);
  } else {
    values_.read_framed(id, place, keys);
    behind_->read(id, index, place, keys + batch_.head_dim);
  }
}

// Of sixteen tokens from `position` on. What is not rotated has its weights in the queries.
void MadeKeys::tie(int64_t position, Lanes* keys) const {
  const int64_t half = batch_.head_dim / 2, place = position * tie_->pairs;
  for (int64_t i = 0; i < tie_->pairs; i++) {
    const Vec cos = load(tie_->cos + place + i * kLanes), sin = load(tie_->sin + place + i * kLanes);
    const Vec first = load(keys[i]) * set1(tie_->weight[i]);
    const Vec second = load(keys[i + half]) * set1(tie_->weight[i + half]);
    store(keys[i], first * cos - second * sin);
    store(keys[i + half], second * cos + first * sin);
  }
}

void MadeKeys::add_reads(const Group& group, int64_t token, Reads& reads) const {
  values_.add_reads(batch_.block(group, token) * batch_.heads + group.head, group.heads, reads);
}

}  // namespace kvist
