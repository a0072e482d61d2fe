#include "dense.h"

#include <algorithm>

#include "product.h"

namespace kvist {
namespace {

// The group's first head in the block that holds the token. The others follow.
template <class Plane>
const typename Plane::Unit* block_of(const Batch& batch, const void* plane, const Group& group, int64_t token) {
  const int64_t heads = batch.block(group, token) * batch.heads + group.head;
  return static_cast<const typename Plane::Unit*>(plane) + heads * batch.block_size * batch.head_dim;
}

template <class Plane>
int64_t head_bytes_of(const Batch& batch) {
  return batch.block_size * batch.head_dim * sizeof(typename Plane::Unit);
}

template <class Plane>
void add_block(const Batch& batch, const void* plane, const Group& group, int64_t token, Reads& reads) {
  reads.add(block_of<Plane>(batch, plane, group, token), group.heads * head_bytes_of<Plane>(batch));
}

template <class Plane>
class DenseKeys : public Keys {
  using Unit = typename Plane::Unit;
  using Scalar = typename Plane::Scalar;

 public:
  DenseKeys(const Batch& batch, const void* plane)
      : batch_(batch), plane_(plane), width_(State(batch.head_dim).width) {}

  void load_queries(const Group& group, float* queries) const override {
    Scalar* scalars = reinterpret_cast<Scalar*>(queries);
    batch_.each_row(group, [&](int64_t token, int64_t head, int64_t row) {
      with_type(batch_.q_type, [&](auto kind) {
        const auto* from =
            static_cast<const decltype(kind)*>(batch_.q) + token * batch_.q_stride + head * batch_.head_dim;
        for (int64_t i = 0; i < width_; i += kLanes)
          Plane::store_scalars(scalars + (row * width_ + i) / Plane::kPack, load_first(from + i, batch_.head_dim - i));
      });
    });
  }

  void score(const Split& split, int64_t head, const float* queries, float* scores, Fetcher& fetcher) const override {
    const Group& group = split.group;
    const int64_t seen = split.seen(), size = batch_.block_size, row = head * group.rows + split.first;
    fetcher.pace(kFetchedInProduct / static_cast<float>(group.heads),
                 ticks(split.rows(), (seen + kLanes - 1) / kLanes * batch_.head_dim / Plane::kPack));
    for (int64_t key = split.begin; key < seen; key += size) {
      Product<Plane> product;
      product.vectors = block_of<Plane>(batch_, plane_, group, split.start + key) + head * size * batch_.head_dim;
      product.column_stride = kLanes * batch_.head_dim;
      product.step_stride = kLanes * Plane::kPack;
      product.scalars = reinterpret_cast<const Scalar*>(queries) + row * width_ / Plane::kPack;
      product.scalar_stride = width_ / Plane::kPack;
      product.out = scores + row * kScoreStride + key;
      product.out_stride = kScoreStride;
      product.rows = split.rows();
      product.columns = (std::min(size, seen - key) + kLanes - 1) / kLanes;
      product.steps = batch_.head_dim / Plane::kPack;
      product.fresh = true;
      product.fetcher = &fetcher;
      multiply(product, false);
    }
  }

  int64_t head_bytes() const override { return head_bytes_of<Plane>(batch_); }
  void add_reads(const Group& group, int64_t token, Reads& reads) const override {
    add_block<Plane>(batch_, plane_, group, token, reads);
  }

 private:
  const Batch& batch_;
  const void* plane_;
  const int64_t width_;
};

template <class Plane>
class DenseValues : public Values {
  using Unit = typename Plane::Unit;
  using Scalar = typename Plane::Scalar;

 public:
  DenseValues(const Batch& batch, const void* plane)
      : batch_(batch), plane_(plane), softening_(batch), state_(batch.head_dim) {}

  // The weights are the scalars of the product with the values.
  void soften(float* scores, int64_t hidden, int64_t seen, float* state, Fetcher& fetcher) const override {
    Scalar* weights = reinterpret_cast<Scalar*>(scores);
    soften_scores(scores, hidden, seen, softening_, state + state_.width, [&](int64_t i, Vec weight) {
      fetcher.tick();
      Plane::store_scalars(weights + i / Plane::kPack, weight);
    });
  }

  // What all rows see, in whole pairs, is weighed for all rows at once. What stands before and behind it is weighed row
  // by row, so that no value, were it infinite, touches a row that does not see it.
  void weigh(const Split& split, float* weights, float* states, Fetcher& fetcher) const override {
    const int64_t seen = split.visible[split.first], oldest = split.hidden[split.last - 1];
    const int64_t start = oldest + oldest % Plane::kPack, end = std::max(start, seen - seen % Plane::kPack);
    if (start) clear(split, states);
    for (int64_t row = split.first; row < split.last && start; row++)
      weigh_rows(split, row, 1, split.hidden[row], std::min(start, split.visible[row]), weights, states, fetcher);
    weigh_rows(split, split.first, split.rows(), start, end, weights, states, fetcher);
    for (int64_t row = split.first; row < split.last; row++)
      weigh_rows(split, row, 1, end, split.visible[row], weights, states, fetcher);
  }

  int64_t head_bytes() const override { return head_bytes_of<Plane>(batch_); }
  void add_reads(const Group& group, int64_t token, Reads& reads) const override {
    add_block<Plane>(batch_, plane_, group, token, reads);
  }

 private:
  // Sums that do not begin with the split's first key begin here.
  void clear(const Split& split, float* states) const {
    for (int64_t head = 0; head < split.group.heads; head++)
      for (int64_t row = split.first; row < split.last; row++)
        std::fill_n(states + (head * split.group.rows + row) * state_.stride(), state_.width, 0.0f);
  }

  // Keys [from, to) of the split for `rows` rows of each head.
  void weigh_rows(const Split& split, int64_t row, int64_t rows, int64_t from, int64_t to, float* weights,
                  float* states, Fetcher& fetcher) const {
    const int64_t size = batch_.block_size, vectors = (to - from) / Plane::kPack * batch_.head_dim / kLanes;
    fetcher.pace(static_cast<float>(rows * (to - from)) / static_cast<float>(split.rows() * split.seen()),
                 ticks(rows, split.group.heads * vectors));
    for (int64_t key = from; key < to;) {
      const int64_t late = key % Plane::kPack, pair = key - late, count = std::min(to - key, size - key % size);
      Product<Plane> product;
      product.vectors = block_of<Plane>(batch_, plane_, split.group, split.start + key) + pair % size * batch_.head_dim;
      product.scalars = reinterpret_cast<const Scalar*>(weights + row * kScoreStride) + pair / Plane::kPack;
      product.out = states + row * state_.stride();
      product.rows = rows;
      product.fresh = key == 0;
      product.fetcher = &fetcher;
      multiply_heads(split.group, late ? 1 : count, late, product);
      key += late ? 1 : count;
    }
  }

  // `count` tokens, all in one block, for all heads of the group; with `late` one, the second of its pair.
  void multiply_heads(const Group& group, int64_t count, bool late, Product<Plane> product) const {
    const bool half = batch_.head_dim % kLanes != 0;
    const int64_t units = batch_.block_size * batch_.head_dim;
    product.column_stride = kLanes * Plane::kPack;
    product.step_stride = batch_.head_dim * Plane::kPack;
    product.scalar_stride = kScoreStride;
    product.out_stride = state_.stride();
    product.columns = batch_.head_dim / kLanes;
    product.steps = count / Plane::kPack;
    for (int64_t head = 0; head < group.heads; head++) {
      if (product.steps) multiply(product, half);
      if constexpr (Plane::kPack == 2) {
        if (late)
          multiply(one_step<SecondOnly>(product, 0), half);
        else if (count % 2)
          multiply(one_step<FirstOnly>(product, product.steps), half);
      }
      product.vectors += units;
      product.scalars += group.rows * kScoreStride;
      product.out += group.rows * state_.stride();
    }
  }

  const Batch& batch_;
  const void* plane_;
  const Softening softening_;
  const State state_;
};

template <template <class> class Side, class Base>
std::unique_ptr<Base> make_side(const Batch& batch, const void* plane, Number type) {
  switch (type) {
    case Number::kFloat32: return std::make_unique<Side<Float32Plane>>(batch, plane);
    case Number::kBFloat16: return std::make_unique<Side<BFloat16Plane>>(batch, plane);
    case Number::kFloat16: return std::make_unique<Side<Float16Plane>>(batch, plane);
  }
  return nullptr;
}

}  // namespace

std::unique_ptr<Keys> dense_keys(const Batch& batch, const void* plane, Number type) {
  return make_side<DenseKeys, Keys>(batch, plane, type);
}

std::unique_ptr<Values> dense_values(const Batch& batch, const void* plane, Number type) {
  return make_side<DenseValues, Values>(batch, plane, type);
}

}  // namespace kvist
