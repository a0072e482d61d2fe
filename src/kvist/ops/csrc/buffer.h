// Memory that begins at a cache line and holds nothing yet.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace kvist {

template <class T>
struct AlignedDelete {
  void operator()(T* buffer) const { ::operator delete[](static_cast<void*>(buffer), std::align_val_t{64}); }
};

template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete<T>>;

template <class T>
Buffer<T> make_buffer(int64_t count) {
  return Buffer<T>(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t{64})));
}

}  // namespace kvist
