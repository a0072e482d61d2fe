#include <limits>

#include "coded.h"
#include "columns.h"

namespace kvist {
namespace {

constexpr int64_t kBlocks = 4;  // whose weights are looked at together: vectors are reduced four at a time

// The sums of both digits of the weights fit an int32 together.
static_assert(kMaxCodedBlock * int64_t{255} * kDigitReach <= std::numeric_limits<int32_t>::max());

}  // namespace

// Up to kBlocks blocks, and what one segment of theirs is multiplied with, for the rows of one head that see any.
struct CodedValues::Weighed {
  int64_t blocks = 0, rows;
  int64_t ids[kBlocks];    // block * heads + head
  const uint8_t* upcoming[kBlocks];  // codes that are wanted after it
  int64_t first[kBlocks];  // the first row that sees it
  alignas(64) float scales[kBlocks][kMaxCodedBlock];
  alignas(64) uint8_t digits[kBlocks][kGroupRows][2][kMaxCodedBlock];
  int32_t start[kBlocks][kGroupRows][2];
  float scale[kGroupRows + kLanes / kBlocks][kBlocks];  // of the sums; first the largest magnitude
  float inverse[kGroupRows + kLanes / kBlocks][kBlocks];

  int64_t seen(int64_t row) const { return std::count_if(first, first + blocks, [=](int64_t f) { return f <= row; }); }
};

namespace {

// The largest magnitudes of weights * scales of the tokens: those of one row in `seen` blocks of kTiles * 16 tokens, the
// others zero.
template <int kTiles, class W, class Count>
Vec largest(const float* weights, Count seen, const W& weighed) {
  Vec top[kBlocks] = {zero(), zero(), zero(), zero()};
  KVIST_UNROLL for (int64_t b = 0; b < seen; b++)
    KVIST_UNROLL for (int i = 0; i < kTiles; i++)
      top[b] = larger_magnitude(
          load(weights + (b * kTiles + i) * kLanes) * load(weighed.scales[b] + i * kLanes), top[b]);
  return four_maxima(top);
}

// weights * scales as whole numbers, those of one row likewise.
template <int kTiles, class W, class Count>
void scale_row(const float* weights, int64_t row, Count seen, W& out) {
  Ints total[kBlocks] = {set1_int(0), set1_int(0), set1_int(0), set1_int(0)};
  KVIST_UNROLL for (int64_t b = 0; b < seen; b++) {
    const Vec inverse = set1(out.inverse[row][b]);
    Ints whole[kTiles];
    KVIST_UNROLL for (int i = 0; i < kTiles; i++) {
      const Vec scaled = load(weights + (b * kTiles + i) * kLanes) * load(out.scales[b] + i * kLanes);
      whole[i] = to_ints(scaled * inverse);
      total[b] = add(total[b], whole[i]);
    }
    auto& digits = out.digits[b][row];
    if constexpr (kTiles == 4)
      store_digits(digits[0], digits[1], whole);
    else
      for (int i = 0; i < kTiles; i++) store_digits(digits[0] + i * kLanes, digits[1] + i * kLanes, whole[i]);
  }
  int32_t totals[kLanes];
  store_ints(totals, four_sums(total));
  KVIST_UNROLL for (int64_t b = 0; b < seen; b++) {
    out.start[b][row][0] = 0;
    out.start[b][row][1] = -128 * totals[b];
  }
}

// The same for all rows that see any, kScoreStride apart. Step by step, so that no row waits for what another one does.
template <int kTiles, class W>
void scale_weights(const float* weights, W& out) {
  const auto each_row = [&](auto f) {
    for (int64_t row = out.first[0]; row < out.rows; row++) {
      const int64_t seen = out.seen(row);
      if (seen == kBlocks)
        f(weights + row * kScoreStride, row, std::integral_constant<int64_t, kBlocks>{});
      else
        f(weights + row * kScoreStride, row, seen);
    }
  };
  each_row([&](const float* from, int64_t row, auto seen) {
    store_first(out.scale[row], largest<kTiles>(from, seen, out), kBlocks);
  });
  const Vec tiny = set1(1e-30f);  // the reciprocal of less overflows, and no row's sum would show such weights
  for (int64_t i = out.first[0] * kBlocks; i < out.rows * kBlocks; i += kLanes) {
    const Vec top = load(out.scale[0] + i);
    store(out.inverse[0] + i, by_sign(top - tiny, zero(), set1(kDigitReach) / top));
    store(out.scale[0] + i, by_sign(top - tiny, zero(), top * set1(1.0f / (kDigitReach * 128.0f))));
  }
  each_row([&](const float* from, int64_t row, auto seen) { scale_row<kTiles>(from, row, seen, out); });
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

void CodedValues::weigh(const Split& split, float* weights, float* states) const {
  const int64_t rows = split.group.rows;
  for (int64_t key = 0; key < split.seen(); key += kBlocks * batch_.block_size)
    for (int64_t head = 0; head < split.group.heads; head++)
      for (int64_t segment = 0; segment < stream_.coding.count(); segment++)
        weigh_blocks(split, key, head, segment, weights + head * rows * kScoreStride + key,
                     states + head * rows * state_.stride());
}

// Up to kBlocks blocks from `key` on, for one head.
void CodedValues::weigh_blocks(const Split& split, int64_t key, int64_t head, int64_t index, const float* weights,
                               float* states) const {
  const Coding& coding = stream_.coding;
  const Segment& segment = coding.segments[index];
  const int64_t size = batch_.block_size;
  Weighed weighed;
  weighed.rows = split.group.rows;
  Vec poison = zero();
  for (int64_t b = 0; b < kBlocks && key + b * size < split.seen(); b++, weighed.blocks++) {
    const int64_t token = key + b * size;
    const int64_t id = batch_.block(split.group, split.start + token) * batch_.heads + split.group.head + head;
    int64_t row = b ? weighed.first[b - 1] : split.first;
    while (split.visible[row] <= token) row++;
    weighed.ids[b] = id;
    const Heads next = token + size < split.seen() ? block(split.group, split.start + token + size) : split.upcoming_keys;
    weighed.upcoming[b] = static_cast<const uint8_t*>(next.first ? next.at(head) : stream_.codes);
    weighed.first[b] = row;
    each_column(size / kLanes, [&](int64_t i) {
      const Vec scale = load(stream_.scales + (id * coding.count() + index) * size + i * kLanes);
      store(weighed.scales[b] + i * kLanes, scale);
      poison = fma(scale, zero(), poison);
    });
  }
  if (sum(poison) != 0) spoil(weighed, states);
  size == 64 ? scale_weights<4>(weights, weighed)
             : size == 32 ? scale_weights<2>(weights, weighed) : scale_weights<1>(weights, weighed);
  for (int64_t b = 0; b < weighed.blocks; b++) add_values(weighed, b, index, key == 0 && b == 0, states);
}

// Rows that see a scale that is not finite are not numbers: their sums become none.
void CodedValues::spoil(const Weighed& weighed, float* states) const {
  for (int64_t b = 0; b < weighed.blocks; b++) {
    const auto infinite = [](float scale) { return !std::isfinite(scale); };
    if (std::none_of(weighed.scales[b], weighed.scales[b] + batch_.block_size, infinite)) continue;
    for (int64_t row = weighed.first[b]; row < weighed.rows; row++)
      state_.sum(states + row * state_.stride()) = std::numeric_limits<float>::quiet_NaN();
  }
}

// One block. `fresh`: the outputs of the rows hold nothing yet.
void CodedValues::add_values(const Weighed& weighed, int64_t b, int64_t index, bool fresh, float* states) const {
  const Segment& segment = stream_.coding.segments[index];
  const int64_t size = batch_.block_size, first = weighed.first[b], rows = weighed.rows - first;
  alignas(64) int32_t sums[2 * kGroupRows * kSumStride];
  Columns columns;
  columns.codes = stream_.codes + weighed.ids[b] * stream_.coding.code_bytes(size) +
                  stream_.coding.bytes_before(index, size);
  columns.upcoming = weighed.upcoming[b] + stream_.coding.bytes_before(index, size);
  columns.column_bytes = kLanes * segment.bits * size / 8;
  columns.steps = size / 4;
  columns.bits = segment.bits;
  columns.levels = &levels_[index];
  columns.scalars = weighed.digits[b][first][0];
  columns.scalar_stride = kMaxCodedBlock;
  columns.rows = 2 * rows;
  columns.digits = 2;
  columns.start = weighed.start[b][first];
  columns.out = sums;
  for (int64_t dim = 0; dim < segment.dims; dim += kSumStride) {
    columns.columns = std::min(kColumns, (segment.dims - dim) / kLanes);
    multiply(columns);
    for (int64_t r = 0; r < rows; r++) {
      float* out = states + (first + r) * state_.stride() + segment.first + dim;
      const Vec scale = set1(weighed.scale[first + r][b]);
      each_column(columns.columns, [&](int64_t i) {
        const Vec whole = whole_sum<2>(sums + 2 * r * kSumStride, i);
        store(out + i * kLanes, fresh ? whole * scale : fma(whole, scale, load(out + i * kLanes)));
      });
    }
    columns.codes += kColumns * columns.column_bytes;
    columns.upcoming += kColumns * columns.column_bytes;
  }
}

}  // namespace kvist
