#include <algorithm>
#include <cmath>
#include <limits>

#include "coded.h"
#include "columns.h"

namespace kvist {
namespace {

constexpr int64_t kDigitStride = kSplit + 64;  // off the power of two, where rows would share their cache sets

// The sums of a digit of all weights of a split fit an int32.
static_assert(kSplit * int64_t{255} * 128 <= std::numeric_limits<int32_t>::max());
constexpr int64_t kSumStride = kMaxCodedDim + kLanes;  // off the power of two, too

// The weights of one row times the scales of its `seen` tokens, a multiple of sixteen, as whole numbers of two digits.
// Returns what one of them stands for; `total` is their sum.
float quantize_weights(const float* weights, const float* scales, int64_t seen, uint8_t* high, uint8_t* low,
                       int32_t& total, Fetcher& fetcher) {
  Vec top[kChains];
  KVIST_UNROLL for (int c = 0; c < kChains; c++) top[c] = zero();
  in_chains(seen, [&](int64_t i, int c) { top[c] = larger_magnitude(load(weights + i) * load(scales + i), top[c]); });
  const float most = maximum(larger(larger(top[0], top[1]), larger(top[2], top[3])));
  const bool any = most > 1e-30f;  // the reciprocal of less overflows, and no row's sum would show such weights
  const Vec inverse = set1(any ? kDigitReach / most : 0.0f);
  Ints sums = set1_int(0);
  const auto whole = [&](int64_t i) {
    fetcher.tick();
    const Ints number = to_ints(load(weights + i) * load(scales + i) * inverse);
    sums = add(sums, number);
    return number;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= seen; i += 4 * kLanes) {
    const Ints four[4] = {whole(i), whole(i + kLanes), whole(i + 2 * kLanes), whole(i + 3 * kLanes)};
    store_digits(high + i, low + i, four);
  }
  for (; i < seen; i += kLanes) store_digits(high + i, low + i, whole(i));
  int32_t lanes[kLanes];
  store_ints(lanes, sums);
  total = 0;
  for (const int32_t lane : lanes) total += lane;
  return any ? most * (1.0f / (kDigitReach * 128.0f)) : 0.0f;
}

}  // namespace

// What one segment of the values of a split is multiplied with: weights * scales of the tokens as whole numbers, for
// the rows of one head; and the sums. There is room beyond, since tiles of rows are read whole.
struct CodedValues::Weighed {
  alignas(64) uint8_t digits[kGroupRows + kTileRows][2][kDigitStride];
  alignas(64) int32_t sums[kGroupRows][2][kSumStride];
  float scale[kGroupRows];
};

CodedValues::CodedValues(const Batch& batch, const CodedStream& stream)
    : batch_(batch), stream_(stream), softening_(batch), state_(batch.head_dim) {
  for (const Segment& segment : stream.coding.segments)
    levels_.push_back(make_levels(segment.levels, segment.bits));
}

void CodedValues::soften(float* scores, int64_t hidden, int64_t seen, float* state, Fetcher& fetcher) const {
  soften_scores(scores, hidden, seen, softening_, state + state_.width, [&](int64_t i, Vec weight) {
    fetcher.tick();
    store(scores + i, weight);
  });
}

void CodedValues::weigh(const Split& split, float* weights, float* states, Fetcher& fetcher) const {
  Weighed weighed;
  for (int64_t head = 0; head < split.group.heads; head++) {
    for (int64_t segment = 0; segment < stream_.coding.count(); segment++) {
      scale_weights(split, head, segment, weights, states, weighed, fetcher);
      add_values(split, head, segment, weighed, fetcher);
      store_sums(split, head, segment, weighed, states);
    }
  }
}

// Rows that see a scale that is not finite are not numbers: the sum of their weights, in their state, becomes none.
void CodedValues::scale_weights(const Split& split, int64_t head, int64_t segment, const float* weights, float* states,
                                Weighed& weighed, Fetcher& fetcher) const {
  const Group& group = split.group;
  const int64_t size = batch_.block_size, segments = stream_.coding.count(), seen = split.seen();
  const int64_t dims = stream_.coding.segments[segment].dims;
  alignas(64) float scales[kSplit];
  Vec poison = zero();
  std::fill_n(scales, split.begin, 0.0f);
  for (int64_t key = split.begin; key < seen; key += size) {
    const int64_t id = batch_.block(group, split.start + key) * batch_.heads + group.head + head;
    for (int64_t i = 0; i < size; i += kLanes) {
      const Vec scale = load(stream_.scales + (id * segments + segment) * size + i);
      poison = fma(scale, zero(), poison);
      store(scales + key + i, scale);
    }
  }
  const bool poisoned = sum(poison) != 0;
  fetcher.pace((1 - kFetchedInProduct) / static_cast<float>(group.heads * segments), split.rows() * seen / kLanes);
  for (int64_t row = split.first; row < split.last; row++) {
    const int64_t index = head * group.rows + row, visible = split.visible[row], hidden = split.hidden[row];
    if (poisoned) std::fill_n(scales, std::min(hidden, visible), 0.0f);  // nor does a later row see these
    int32_t total;
    weighed.scale[row] = quantize_weights(weights + index * kScoreStride, scales, visible, weighed.digits[row][0],
                                          weighed.digits[row][1], total, fetcher);
    std::fill_n(weighed.sums[row][0], dims, 0);
    std::fill_n(weighed.sums[row][1], dims, -kByteOffset * total);  // see Columns
    const auto infinite = [](float scale) { return !std::isfinite(scale); };
    if (poisoned && split.sees(row) && std::any_of(scales + hidden, scales + visible, infinite))
      state_.sum(states + index * state_.stride()) = std::numeric_limits<float>::quiet_NaN();
  }
}

void CodedValues::add_values(const Split& split, int64_t head, int64_t index, Weighed& weighed,
                             Fetcher& fetcher) const {
  const Group& group = split.group;
  const Coding& coding = stream_.coding;
  const Segment& segment = coding.segments[index];
  const int64_t size = batch_.block_size;
  Columns columns;
  columns.column_bytes = kLanes * segment.bits * size / 8;
  columns.steps = size / 4;
  columns.bits = segment.bits;
  columns.levels = &levels_[index];
  columns.scalar_stride = kDigitStride;
  columns.digits = 2;
  columns.start = nullptr;
  columns.out_stride = kSumStride;
  fetcher.pace(kFetchedInProduct * static_cast<float>(segment.dims) / static_cast<float>(coding.dim * group.heads),
               split.seen() / size * ticks(segment.dims / kLanes, columns.steps));
  for (int64_t key = split.begin, first = split.first; key < split.seen(); key += size) {
    while (split.visible[first] <= key) first++;
    columns.rows = 2 * (split.last - first);
    const int64_t id = batch_.block(group, split.start + key) * batch_.heads + group.head + head;
    columns.codes = stream_.codes + id * coding.code_bytes(size) + coding.bytes_before(index, size);
    columns.scalars = weighed.digits[first][0] + key;
    for (int64_t dim = 0; dim < segment.dims; dim += kColumns * kLanes) {
      columns.columns = std::min(kColumns, (segment.dims - dim) / kLanes);
      columns.out = weighed.sums[first][0] + dim;
      multiply(columns, fetcher);
      columns.codes += kColumns * columns.column_bytes;
    }
  }
}

void CodedValues::store_sums(const Split& split, int64_t head, int64_t index, const Weighed& weighed,
                             float* states) const {
  const Segment& segment = stream_.coding.segments[index];
  for (int64_t row = split.first; row < split.last; row++) {
    const Vec scale = set1(weighed.scale[row]);
    float* out = states + (head * split.group.rows + row) * state_.stride() + segment.first;
    for (int64_t i = 0; i < segment.dims / kLanes; i++)
      store(out + i * kLanes, whole_sum<2>(weighed.sums[row][0], kSumStride, i) * scale);
  }
}

}  // namespace kvist
