#include <limits>

#include "coded.h"
#include "columns.h"

namespace kvist {
namespace {

constexpr int64_t kMostSegments = kMaxCodedDim / 16;
constexpr int64_t kTogether = 4;  // rows, since vectors are reduced four at a time

// The sums of both digits of the weights fit an int32 together.
static_assert(kMaxCodedBlock * int64_t{255} * kDigitReach <= std::numeric_limits<int32_t>::max());

}  // namespace

// What one segment of a block is multiplied with: weights * scales of the tokens as whole numbers, for the rows of a
// group, head after head. There is room beyond, since vectors of scales and tiles of rows are written and read whole.
struct CodedValues::Weighed {
  alignas(64) uint8_t digits[kGroupRows + kTileRows][2][kMaxCodedBlock];
  int32_t start[kGroupRows][2];  // of the sums, see Columns
  float scale[kGroupRows + kLanes];
};

namespace {

// For `count` rows from `row` on, at most kTogether, kScoreStride apart, of a block of kTiles * 16 tokens.
template <int kTiles, class W>
void scale_rows(const float* weights, int64_t count, const Vec (&scales)[kTiles], int64_t row, W& out) {
  Vec top[kTogether];
  KVIST_UNROLL for (int r = 0; r < kTogether; r++) {
    const float* from = weights + std::min<int64_t>(r, count - 1) * kScoreStride;
    top[r] = zero();
    KVIST_UNROLL for (int i = 0; i < kTiles; i++)
      top[r] = larger_magnitude(load(from + i * kLanes) * scales[i], top[r]);
  }
  const Vec tops = four_maxima(top);
  const Vec tiny = set1(1e-30f);  // the reciprocal of less overflows, and no row's sum would show such weights
  float inverse[kLanes];
  store(inverse, by_sign(tops - tiny, zero(), set1(kDigitReach) / tops));
  store(out.scale + row, by_sign(tops - tiny, zero(), tops * set1(1.0f / (kDigitReach * 128.0f))));
  Ints total[kTogether] = {set1_int(0), set1_int(0), set1_int(0), set1_int(0)};
  for (int64_t r = 0; r < count; r++) {
    Ints whole[kTiles];
    KVIST_UNROLL for (int i = 0; i < kTiles; i++) {
      whole[i] = to_ints(load(weights + r * kScoreStride + i * kLanes) * scales[i] * set1(inverse[r]));
      total[r] = add(total[r], whole[i]);
    }
    auto& digits = out.digits[row + r];
    if constexpr (kTiles == 4)
      store_digits(digits[0], digits[1], whole);
    else
      for (int i = 0; i < kTiles; i++) store_digits(digits[0] + i * kLanes, digits[1] + i * kLanes, whole[i]);
  }
  int32_t totals[kLanes];
  store_ints(totals, four_sums(total));
  for (int64_t r = 0; r < count; r++) {
    out.start[row + r][0] = 0;
    out.start[row + r][1] = -128 * totals[r];
  }
}

// For rows [first, end), of which `weights` are the first one's. Adds to `poison` what is not zero where a scale is not
// finite.
template <int kTiles, class W>
void scale_head(const float* weights, const Float16* token_scales, int64_t first, int64_t end, Vec& poison, W& out) {
  Vec scales[kTiles];
  KVIST_UNROLL for (int i = 0; i < kTiles; i++) {
    scales[i] = load(token_scales + i * kLanes);
    poison = fma(scales[i], zero(), poison);
  }
  for (int64_t row = first; row < end; row += kTogether, weights += kTogether * kScoreStride)
    scale_rows<kTiles>(weights, std::min(kTogether, end - row), scales, row, out);
}

}  // namespace

CodedValues::CodedValues(const Batch& batch, const CodedStream& stream)
    : batch_(batch), stream_(stream), scale_(batch.binary_scale()), state_(batch.head_dim) {
  for (const Segment& segment : stream.coding.segments)
    levels_.push_back(make_levels(segment.levels, segment.bits));
}

void CodedValues::soften(float* scores, int64_t seen, float* state) const {
  soften_scores(scores, seen, scale_, state + state_.width, [&](int64_t i, Vec weight) { store(scores + i, weight); });
}

void CodedValues::weigh(const Split& split, float* weights, float* states, Fetcher& fetcher) const {
  const Group& group = split.group;
  const int64_t size = batch_.block_size, segments = stream_.coding.count();
  Vec poison = zero();
  Weighed weighed[kMostSegments];
  fetcher.begin(split.blocks);
  for (int64_t key = 0, first = split.first; key < split.seen(); key += size) {
    while (split.visible[first] <= key) first++;
    const int64_t id = batch_.block(group, split.start + key) * batch_.heads + group.head;
    for (int64_t head = 0; head < group.heads; head++) {
      for (int64_t i = 0; i < segments; i++) {
        const int64_t row = head * group.rows + first, end = (head + 1) * group.rows;
        const float* from = weights + row * kScoreStride + key;
        const Float16* scales = stream_.scales + ((id + head) * segments + i) * size;
        size == 64   ? scale_head<4>(from, scales, row, end, poison, weighed[i])
        : size == 32 ? scale_head<2>(from, scales, row, end, poison, weighed[i])
                     : scale_head<1>(from, scales, row, end, poison, weighed[i]);
      }
    }
    for (int64_t head = 0; head < group.heads; head++)
      for (int64_t i = 0; i < segments; i++)
        add_values(weighed[i], id + head, i, head * group.rows + first, group.rows - first, key == 0, states, fetcher);
  }
  if (sum(poison) != 0) spoil(split, states);
}

// Rows that see a scale that is not finite are not numbers: their sums become none.
void CodedValues::spoil(const Split& split, float* states) const {
  const Group& group = split.group;
  const int64_t size = batch_.block_size, count = stream_.coding.count() * size;
  for (int64_t key = 0; key < split.seen(); key += size) {
    for (int64_t head = 0; head < group.heads; head++) {
      const int64_t id = batch_.block(group, split.start + key) * batch_.heads + group.head + head;
      const auto finite = [](Float16 scale) { return (scale.bits & 0x7c00) != 0x7c00; };
      if (std::all_of(stream_.scales + id * count, stream_.scales + (id + 1) * count, finite)) continue;
      for (int64_t row = split.first; row < group.rows; row++)
        if (split.visible[row] > key)
          state_.sum(states + (head * group.rows + row) * state_.stride()) = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

// One segment of one head of a block, for rows [row, row + rows). `fresh`: their outputs hold nothing yet.
void CodedValues::add_values(const Weighed& weighed, int64_t id, int64_t index, int64_t row, int64_t rows, bool fresh,
                             float* states, Fetcher& fetcher) const {
  const Segment& segment = stream_.coding.segments[index];
  const int64_t size = batch_.block_size;
  alignas(64) int32_t sums[2 * kGroupRows * kSumStride];
  Columns columns;
  columns.codes = stream_.codes + id * stream_.coding.code_bytes(size) + stream_.coding.bytes_before(index, size);
  columns.column_bytes = kLanes * segment.bits * size / 8;
  columns.steps = size / 4;
  columns.bits = segment.bits;
  columns.levels = &levels_[index];
  columns.scalars = weighed.digits[row][0];
  columns.scalar_stride = kMaxCodedBlock;
  columns.rows = 2 * rows;
  columns.digits = 2;
  columns.start = weighed.start[row];
  columns.out = sums;
  for (int64_t dim = 0; dim < segment.dims; dim += kSumStride) {
    columns.columns = std::min(kColumns, (segment.dims - dim) / kLanes);
    columns.upcoming = fetcher.take(columns.bytes());
    multiply(columns);
    for (int64_t r = 0; r < rows; r++) {
      float* out = states + (row + r) * state_.stride() + segment.first + dim;
      const Vec scale = set1(weighed.scale[row + r]);
      each_column(columns.columns, [&](int64_t i) {
        const Vec whole = whole_sum<2>(sums + 2 * r * kSumStride, i);
        store(out + i * kLanes, fresh ? whole * scale : fma(whole, scale, load(out + i * kLanes)));
      });
    }
    columns.codes += kColumns * columns.column_bytes;
  }
}

}  // namespace kvist
