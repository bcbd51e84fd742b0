// arena.cpp: see arena.h. Compiled for the baseline only.
#include "core/arena.h"

#include <cstdlib>

namespace rfk {

namespace {
constexpr int64_t kRetained = 64 << 20;
constexpr int64_t kPage = 4096;
}  // namespace

Arena::~Arena() { std::free(block_); }

char* Arena::take(int64_t bytes) {
  if (bytes > size_) {
    std::free(block_);
    const int64_t rounded = (bytes + kPage - 1) / kPage * kPage;
    block_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(rounded)));
    size_ = block_ != nullptr ? rounded : 0;
  }
  return block_;
}

void Arena::trim() {
  if (size_ <= kRetained) return;
  std::free(block_);
  block_ = nullptr;
  size_ = 0;
}

}  // namespace rfk
