// One thread codes one head of one block at a time: sixteen tokens at once, one to a lane, then the columns of codes.
// The operations and their order are those of coding.py, except within sums.
#include "seal.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>

#include "batch.h"
#include "bytes.h"
#include "frame.h"
#include "parallel.h"

namespace kvist {
namespace {

constexpr int64_t kGrain = 4;  // heads of blocks that pay for waking one more thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kTried[] = {1.22f, 1.16f, 1.1f, 1.05f, 1.0f, 0.96f, 0.92f, 0.88f, 0.84f};  // coding.py says what for

// Where sixteen tokens, from a multiple of sixteen on, stand in one head of one block of a plane.
struct Tokens {
  bool keys, paired;  // pairs of dims (keys) or of tokens (values) beside each other
  int64_t dims;
  int64_t step, pair;  // from a token of even number to the next such, and to the one in between

  Tokens(bool keys, Number type, int64_t dims) : keys(keys), paired(type == Number::kBFloat16), dims(dims) {
    step = keys ? (paired ? 4 : 2) : 2 * dims;
    pair = keys ? step / 2 : paired ? 1 : dims;
  }

  int64_t first(int64_t token, int64_t dim) const {
    if (!keys) return token * dims + (paired ? 2 * dim : dim);
    return token * dims + (paired ? dim / 2 * 2 * kLanes + dim % 2 : dim * kLanes);
  }

  template <class T>
  Vec load(const T* from) const {
    if (pair == 1 && step == 2) return kvist::load(from);
    T lanes[kLanes];
    for (int64_t i = 0; i < kLanes; i += 2, from += step) lanes[i] = from[0], lanes[i + 1] = from[pair];
    return kvist::load(lanes);
  }

  template <class T>
  void store(T* to, Vec x) const {
    T lanes[kLanes];
    kvist::store(lanes, x);
    for (int64_t i = 0; i < kLanes; i += 2, to += step) to[0] = lanes[i], to[pair] = lanes[i + 1];
  }
};

void read(const SealCall& call, int64_t block, int64_t token, Lanes* x) {
  const Tokens tokens(call.keys, call.open_type, call.head_dim);
  with_type(call.open_type, [&](auto kind) {
    const auto* from = static_cast<const decltype(kind)*>(call.open) + block * call.block_size * call.head_dim;
    for (int64_t i = 0; i < call.head_dim; i++) store(x[i], tokens.load(from + tokens.first(token, i)));
  });
}

void write(const SealCall& call, int64_t block, int64_t token, const Lanes* x) {
  const Tokens tokens(call.keys, call.plane_type, call.head_dim);
  with_type(call.plane_type, [&](auto kind) {
    auto* to = static_cast<decltype(kind)*>(call.plane) + block * call.block_size * call.head_dim;
    for (int64_t i = 0; i < call.head_dim; i++) tokens.store(to + tokens.first(token, i), load(x[i]));
  });
}

// What sixteen vectors of a segment are measured by: the largest magnitude, that number itself, or the norm. Not a
// number where some number is not finite.
Vec reach_of(const Lanes* x, int64_t dims, Rule rule) {
  Vec top = zero(), signed_top = zero(), squares = zero(), poison = zero();
  for (int64_t i = 0; i < dims; i++) {
    const Vec number = load(x[i]), size = absolute(number);
    signed_top = where_greater(size, top, number, signed_top);
    top = larger(size, top);
    squares = squares + number * number;
    poison = fma(number, zero(), poison);
  }
  const Vec reach = rule == Rule::kAbsmax ? top : rule == Rule::kSignedMax ? signed_top : square_root(squares);
  return reach + poison;
}

// a / b, zero where `by` is.
Vec divide_unless_zero(Vec a, Vec b, Vec by) {
  float quotients[kLanes], whether[kLanes];
  store(quotients, a / b);
  store(whether, by);
  for (int64_t i = 0; i < kLanes; i++) quotients[i] = whether[i] == 0 ? 0.0f : quotients[i];
  return load(quotients);
}

// Codes of numbers in units of a level, and the levels they name.
template <int kBits>
class Coder {
 public:
  explicit Coder(const Segment& segment) {
    for (int i = 0; i < kLevels; i++) levels_[i] = segment.levels[i];
    float borders[16];  // in the middle between levels
    for (int i = 0; i < 16; i++) borders[i] = i + 1 < kLevels ? (levels_[i] + levels_[i + 1]) / 2 : kInfinity;
    borders_ = make_borders(borders);
  }

  // A number at the middle of two levels takes the upper one.
  Ints code(Vec y) const {
    if constexpr (kBits == 8) return to_ints(larger(smaller(y, set1(127)), set1(-127)));
    else return count_borders<kBits>(y, borders_);
  }

  Vec level(Ints code) const {
    if constexpr (kBits == 8) return to_float(code);
    else return look_up(levels_, code);
  }

 private:
  static constexpr int kLevels = kBits == 8 ? 1 : 1 << kBits;
  float levels_[16] = {};
  Borders borders_;
};

// What sixteen vectors have in common with their levels.
struct Fit {
  Vec match, square;  // <x, l> and |l|^2
};

template <int kBits>
Fit fit(const Lanes* x, int64_t dims, const Coder<kBits>& coder, Vec per_level, uint8_t* codes) {
  Vec match = zero(), square = zero();
  for (int64_t i = 0; i < dims; i++) {
    const Vec number = load(x[i]);
    const Ints code = coder.code(number * per_level);
    const Vec level = coder.level(code);
    match = fma(number, level, match);
    square = fma(level, level, square);
    store_low_bytes(codes + i * kMaxCodedBlock, code);
  }
  return {match, square};
}

// Levels per number: of `per_level` times those that are tried, the first whose levels come nearest to the vectors.
template <int kBits>
Vec search(const Lanes* x, int64_t dims, const Coder<kBits>& coder, Vec per_level) {
  constexpr int kTogether = 3;  // sums that do not wait for each other
  static_assert(std::size(kTried) % kTogether == 0);
  Vec best = per_level, most = zero();
  for (size_t first = 0; first < std::size(kTried); first += kTogether) {
    Vec tried[kTogether], match[kTogether], square[kTogether];
    KVIST_UNROLL for (int j = 0; j < kTogether; j++) {
      tried[j] = per_level * set1(kTried[first + j]);
      match[j] = square[j] = zero();
    }
    for (int64_t i = 0; i < dims; i++) {
      const Vec number = load(x[i]);
      KVIST_UNROLL for (int j = 0; j < kTogether; j++) {
        const Vec level = coder.level(coder.code(number * tried[j]));
        match[j] = fma(number, level, match[j]);
        square[j] = fma(level, level, square[j]);
      }
    }
    KVIST_UNROLL for (int j = 0; j < kTogether; j++) {
      const Vec captured = match[j] * match[j] / square[j];
      best = where_greater(captured, most, tried[j], best);
      most = where_greater(captured, most, captured, most);
    }
  }
  return best;
}

// The codes of sixteen vectors of a segment, kMaxCodedBlock from channel to channel, and their scales.
template <int kBits>
void quantize(const Lanes* x, const Segment& segment, Rule rule, uint8_t* codes, Float16* scales) {
  const bool by_norm = rule == Rule::kUnbiased || rule == Rule::kLeastSquares;
  const double deviations = segment.per_deviation * std::sqrt(static_cast<double>(segment.dims));
  const double top = by_norm ? deviations : rule == Rule::kAbsmax ? 127 : segment.levels[0];
  const Coder<kBits> coder(segment);
  const Vec reach = reach_of(x, segment.dims, rule);
  Vec per_level = divide_unless_zero(set1(static_cast<float>(top)), reach, reach);
  if (by_norm && kBits < 8) per_level = search(x, segment.dims, coder, per_level);
  const Fit found = fit(x, segment.dims, coder, per_level, codes);
  if (rule == Rule::kUnbiased)
    store(scales, divide_unless_zero(reach * reach, found.match, reach) * set1(128));
  else if (rule == Rule::kLeastSquares)
    store(scales, divide_unless_zero(found.match, found.square, reach) * set1(128));
  else
    store(scales, reach * set1(static_cast<float>(128 / top)));
}

// 64 codes to 64 / (8 / bits) bytes of bits each, `together` steps to 64 bytes.
void pack_steps(const uint8_t (*steps)[64], int64_t count, int64_t bits, uint8_t mask, uint8_t* to) {
  const int64_t together = 8 / bits;
  for (int64_t step = 0; step < count; step += together, to += 64) {
    for (int64_t j = 0; j < 64; j++) {
      int packed = 0;
      for (int64_t i = 0; i < together; i++) packed |= (steps[step + i][j] & mask) << (i * bits);
      to[j] = static_cast<uint8_t>(packed);
    }
  }
}

// A column of `count` steps; coding.py describes it.
void pack_column(const uint8_t (*steps)[64], int64_t count, int64_t bits, uint8_t* to) {
  if (bits != 3) return pack_steps(steps, count, bits, 0xff, to);
  pack_steps(steps, count, 2, 3, to);
  to += 16 * count;
  for (int64_t step = 0; step < count; step++) {
    for (int64_t j = 0; j < 64; j += 8, to++) {
      int high = 0;
      for (int64_t i = 0; i < 8; i++) high |= (steps[step][j + i] >> 2 & 1) << i;
      *to = static_cast<uint8_t>(high);
    }
  }
}

// The codes of one segment of one head of one block, channel after channel, into columns.
void pack(const SealCall& call, int64_t index, const uint8_t* codes, uint8_t* to) {
  const Coding& coding = *call.coding;
  const Segment& segment = coding.segments[index];
  alignas(64) uint8_t steps[kMaxCodedDim / 4][64];
  const int64_t count = (call.keys ? segment.dims : call.block_size) / 4;
  const int64_t columns = (call.keys ? call.block_size : segment.dims) / kLanes;
  to += coding.bytes_before(index, call.keys ? kLanes : call.block_size);
  for (int64_t column = 0; column < columns; column++) {
    for (int64_t step = 0; step < count; step++) {
      for (int64_t lane = 0; lane < kLanes; lane++) {
        const int64_t across = column * kLanes + lane;
        if (call.keys)
          for (int64_t i = 0; i < 4; i++) steps[step][4 * lane + i] = codes[(4 * step + i) * kMaxCodedBlock + across];
        else
          std::memcpy(steps[step] + 4 * lane, codes + across * kMaxCodedBlock + 4 * step, 4);
      }
    }
    pack_column(steps, count, segment.bits, to);
    to += call.keys ? coding.code_bytes(kLanes) : count * 64 * segment.bits / 8;
  }
}

// `source`, `target`: blocks times heads.
void seal_head(const SealCall& call, int64_t head, int64_t source, int64_t target) {
  const Coding& coding = *call.coding;
  const float* mean = call.frame.mean + head * coding.dim;
  const int32_t* order = call.frame.order + head * coding.dim;
  alignas(64) Lanes plain[kMaxCodedDim], x[kMaxCodedDim];
  alignas(64) uint8_t codes[kMaxCodedDim * kMaxCodedBlock];
  Float16* scales = call.scales + target * coding.count() * call.block_size;
  for (int64_t token = 0; token < call.block_size; token += kLanes) {
    read(call, source, token, plain);
    for (int64_t i = 0; i < coding.dim; i++) store(x[i], load(plain[order[i]]) - set1(mean[order[i]]));
    rotate(x, coding, call.frame);
    for (int64_t i = 0; i < coding.count(); i++) {
      const Segment& segment = coding.segments[i];
      with_bits(segment.bits, [&](auto bits) {
        quantize<decltype(bits)::value>(x + segment.first, segment, coding.rule,
                                        codes + segment.first * kMaxCodedBlock + token,
                                        scales + i * call.block_size + token);
      });
    }
  }
  for (int64_t i = 0; i < coding.count(); i++)
    pack(call, i, codes + coding.segments[i].first * kMaxCodedBlock,
         call.codes + target * coding.code_bytes(call.block_size));
}

void copy_head(const SealCall& call, int64_t source, int64_t target) {
  alignas(64) Lanes x[kMaxHeadDim];
  for (int64_t token = 0; token < call.block_size; token += kLanes) {
    read(call, source, token, x);
    write(call, target, token, x);
  }
}

}  // namespace

void seal(const SealCall& call) {
  parallel_for(call.count * call.heads, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t head = i % call.heads, block = i / call.heads;
      const int64_t source = call.sources[block] * call.heads + head, target = call.targets[block] * call.heads + head;
      call.coding ? seal_head(call, head, source, target) : copy_head(call, source, target);
    }
  });
}

}  // namespace kvist
