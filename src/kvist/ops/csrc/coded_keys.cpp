#include <algorithm>
#include <limits>

#include "coded.h"
#include "columns.h"
#include "parallel.h"

namespace kvist {
namespace {

constexpr int64_t kBeyond = kTileRows * kMaxCodedDim + 64;  // bytes that the last tile may look at
constexpr int64_t kSumStride = kColumns * kLanes;
constexpr int64_t kGrain = 16;  // times sixteen rows that pay for waking one more thread

// The sums of a digit fit an int32.
static_assert(kMaxCodedDim * int64_t{255} * 128 <= std::numeric_limits<int32_t>::max());

// Scores of rows, kScoreStride apart, from their sums: sum * scale of the query * scale of the token.
template <int kDigits, bool kFresh>
void scale_sums(const Columns& columns, const Float16* token_scales, const float* row_scales, float* out) {
  Vec scales[kColumns];
  each_column(columns.columns, [&](int64_t i) {
    const Vec scale = load(token_scales + i * kLanes);
    scales[i] = fma(scale, zero(), scale);  // an infinite one becomes NaN, which no softmax overlooks
  });
  const int32_t* sums = columns.out;
  for (int64_t row = 0; row < columns.rows / kDigits; row++, sums += kDigits * kSumStride, out += kScoreStride) {
    const Vec scale = set1(row_scales[row]);
    each_column(columns.columns, [&](int64_t i) {
      const Vec score = whole_sum<kDigits>(sums, kSumStride, i) * scale * scales[i];
      store(out + i * kLanes, kFresh ? score : load(out + i * kLanes) + score);
    });
  }
}

}  // namespace

CodedKeys::CodedKeys(const Batch& batch, const CodedStream& stream)
    : batch_(batch), stream_(stream), rows_(batch.rows()) {
  const int64_t all = batch.heads * rows_;
  lost_ = make_buffer<float>(all);
  for (const Segment& segment : stream.coding.segments) {
    const int64_t digits = segment.bits == 8 ? 2 : 1;
    parts_.push_back({digits, make_levels(segment.levels, segment.bits),
                      make_buffer<uint8_t>(all * digits * segment.dims + kBeyond), make_buffer<int32_t>(all * digits),
                      make_buffer<float>(all)});
  }
  const int64_t queries = rows_ * batch.heads, batches = (queries + kLanes - 1) / kLanes;
  parallel_for(batches, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) load_rows(i * kLanes, std::min<int64_t>(kLanes, queries - i * kLanes));
  });
}

float CodedKeys::lost(const Group& group, int64_t row) const {
  const int64_t first = batch_.starts[group.sequence] * batch_.heads_per_kv() + group.first_row;
  return lost_[(group.head + row / group.rows) * rows_ + first + row % group.rows];
}

// Queries [first, first + count) as they stand in q, one to a lane.
void CodedKeys::load_rows(int64_t first, int64_t count) {
  const int64_t dims = batch_.head_dim, group = batch_.heads_per_kv();
  alignas(64) Lanes x[kMaxCodedDim];
  int64_t rows[kLanes];
  if (count < kLanes) std::fill_n(x[0], dims * kLanes, 0.0f);
  for (int64_t lane = 0; lane < count; lane++) {
    const int64_t token = (first + lane) / batch_.query_heads, query_head = (first + lane) % batch_.query_heads;
    const int64_t head = query_head / group;
    rows[lane] = head * rows_ + token * group + query_head % group;
    alignas(64) float query[kMaxCodedDim];
    Vec lost = zero();
    with_type(batch_.q_type, [&](auto kind) {
      const auto* from = static_cast<const decltype(kind)*>(batch_.q) + token * batch_.q_stride + query_head * dims;
      for (int64_t i = 0; i < dims; i += kLanes) {
        store(query + i, load(from + i));
        lost = fma(load(query + i), load(stream_.frame.mean + head * dims + i), lost);
      }
    });
    lost_[rows[lane]] = sum(lost) * batch_.binary_scale();
    const int32_t* order = stream_.frame.order + head * dims;
    for (int64_t i = 0; i < dims; i++) x[i][lane] = query[order[i]];
  }
  rotate(x, stream_.coding, stream_.frame);
  for (int64_t i = 0; i < stream_.coding.count(); i++) {
    const Segment& segment = stream_.coding.segments[i];
    quantize(x + segment.first, segment.dims, parts_[i], rows, count);
  }
}

// Rows whose queries are not finite get a scale that is not, and with it their scores.
void CodedKeys::quantize(const Lanes* x, int64_t dims, Part& part, const int64_t* rows, int64_t count) const {
  Vec top = zero(), poison = zero();
  for (int64_t i = 0; i < dims; i++) {
    const Vec number = load(x[i]);
    top = larger(absolute(number), top);
    poison = fma(number, zero(), poison);
  }
  const Vec most = set1(part.digits == 1 ? 127.0f : kDigitReach);
  const Vec inverse = most / larger(set1(1e-30f), top);
  float scale[kLanes];
  store(scale, top * (set1(1.0f / 128) / most) + poison);
  uint8_t low[kMaxCodedDim][kLanes], high[kMaxCodedDim][kLanes];
  Ints total = set1_int(0);
  for (int64_t i = 0; i < dims; i++) {
    const Ints whole = to_ints(load(x[i]) * inverse);
    part.digits == 1 ? store_low_bytes(low[i], whole) : store_digits(high[i], low[i], whole);
    total = add(total, whole);
  }
  int32_t totals[kLanes];
  store_ints(totals, total);
  for (int64_t lane = 0; lane < count; lane++) {
    const int64_t row = rows[lane] * part.digits;
    uint8_t* scalars = part.scalars.get() + row * dims;
    if (part.digits == 2) {
      for (int64_t i = 0; i < dims; i++) scalars[i] = high[i][lane];
      scalars += dims;
      part.start[row] = 0;
    }
    for (int64_t i = 0; i < dims; i++) scalars[i] = low[i][lane];
    part.start[row + part.digits - 1] = -kByteOffset * totals[lane];
    part.scale[rows[lane]] = scale[lane];
  }
}

void CodedKeys::score(const Split& split, int64_t head, const float*, float* scores, Fetcher& fetcher) const {
  for (int64_t segment = 0; segment < stream_.coding.count(); segment++)
    add_scores(split, head, segment, scores + (head * split.group.rows + split.first) * kScoreStride, fetcher);
}

// What one segment of the channels adds to the scores of one head: scale of the query * scale of the token * sum of
// whole numbers.
void CodedKeys::add_scores(const Split& split, int64_t head, int64_t index, float* scores, Fetcher& fetcher) const {
  const Group& group = split.group;
  const Coding& coding = stream_.coding;
  const Segment& segment = coding.segments[index];
  const Part& part = parts_[index];
  const int64_t size = batch_.block_size, digits = part.digits;
  const int64_t row = (group.head + head) * rows_ + batch_.starts[group.sequence] * batch_.heads_per_kv() +
                      group.first_row + split.first;
  alignas(64) int32_t sums[2 * kGroupRows * kSumStride];
  Columns columns;
  columns.column_bytes = coding.code_bytes(kLanes);
  columns.columns = size / kLanes;
  columns.steps = segment.dims / 4;
  columns.bits = segment.bits;
  columns.levels = &part.levels;
  columns.scalars = part.scalars.get() + row * digits * segment.dims;
  columns.scalar_stride = segment.dims;
  columns.rows = split.rows() * digits;
  columns.digits = digits;
  columns.start = part.start.get() + row * digits;
  columns.out = sums;
  columns.out_stride = kSumStride;
  const auto scale = digits == 1 ? (index ? scale_sums<1, false> : scale_sums<1, true>)
                                 : (index ? scale_sums<2, false> : scale_sums<2, true>);
  fetcher.pace(kFetchedInProduct * static_cast<float>(segment.dims) / static_cast<float>(coding.dim * group.heads),
               split.seen() / size * ticks(columns.columns, columns.steps));
  for (int64_t key = split.begin; key < split.seen(); key += size) {
    const int64_t id = batch_.block(group, split.start + key) * batch_.heads + group.head + head;
    columns.codes = stream_.codes + id * coding.code_bytes(size) + coding.bytes_before(index, kLanes);
    multiply(columns, fetcher);
    scale(columns, stream_.scales + (id * coding.count() + index) * size, part.scale.get() + row, scores + key);
  }
}

}  // namespace kvist
