// Each thread owns whole heads, so no two write to one cache line.
#include "write.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "parallel.h"
#include "vec.h"

namespace kvist {
namespace {

constexpr int64_t kGrain = 1 << 14;  // numbers that pay for waking one more thread
constexpr int64_t kMaxHeadDim = 512;

// One head's vector in the type of the plane, rounded to nearest even.
template <class From, class To>
void convert(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    for (int64_t i = 0; i < count; i += kLanes) store_first(to + i, load_first(from + i, count - i), count - i);
  }
}

// Spreads a vector over a plane that packs `pack` numbers side by side: numbers go to rows of `row` units, `pack` at a
// time, `step` units from one group to the next.
template <class T>
void spread(const T* vector, int64_t count, int64_t pack, int64_t step, T* to) {
  for (int64_t i = 0; i < count; i += pack, to += step)
    for (int64_t j = 0; j < pack; j++) to[j] = vector[i + j];
}

template <class From, class To>
void write_heads(const WriteCall& call, int64_t begin, int64_t end) {
  constexpr int64_t kPack = std::is_same_v<To, BFloat16> ? 2 : 1;
  const int64_t dims = call.head_dim, size = call.block_size;
  To vector[kMaxHeadDim];
  for (int64_t head = begin; head < end; head++) {
    for (int64_t token = 0; token < call.tokens; token++) {
      if (call.slots[token] < 0) continue;
      const int64_t block = call.slots[token] / size, within = call.slots[token] % size;
      const int64_t start = (block * call.heads + head) * size * dims;
      convert(static_cast<const From*>(call.k) + token * call.k_stride + head * dims, dims, vector);
      To* keys = static_cast<To*>(call.keys) + start + within / kLanes * kLanes * dims + within % kLanes * kPack;
      spread(vector, dims, kPack, kLanes * kPack, keys);
      convert(static_cast<const From*>(call.v) + token * call.v_stride + head * dims, dims, vector);
      To* values = static_cast<To*>(call.values) + start + within / kPack * kPack * dims + within % kPack;
      spread(vector, dims, 1, kPack, values);
    }
  }
}

}  // namespace

void write(const WriteCall& call) {
  with_type(call.type, [&](auto from) {
    with_type(call.plane_type, [&](auto to) {
      const int64_t per_head = std::max<int64_t>(1, call.tokens * call.head_dim * 2);
      parallel_for(call.heads, std::max<int64_t>(1, kGrain / per_head), [&](int64_t begin, int64_t end) {
        write_heads<decltype(from), decltype(to)>(call, begin, end);
      });
    });
  });
}

}  // namespace kvist
