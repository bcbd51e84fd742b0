// random_test.cpp: Random123's known answers, and normals and uniforms of every level against single counters.
#include "checks.h"

using namespace rfk_test;

namespace {

void known_answers() {
  const uint32_t cases[3][10] = {
      {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
      {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
       0x6d5451fd},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
       0x24126ea1}};
  for (const auto& c : cases) {
    uint32_t words[4];
    rfk_philox4x32(c, c + 4, words);
    for (int l = 0; l < 4; ++l) CHECK(words[l] == c[6 + l], "word %d is %08x", l, words[l]);
  }
}

void one(Dice& dice, int dtype) {
  const std::vector<int64_t> shape = some_shape(dice);
  const int layout = dice.roll(kOutputLayouts), distribution = dice.roll(2);
  int64_t batch = shape.empty() ? 1 : shape[0];
  const Noise noise(dice, batch);
  at_every_level(RFK_OP_RANDOM, [&](const char* level) {
    Tensor out(dtype, shape, layout);
    CHECK(rfk_random(&kCpuDevice, &noise.view, distribution, out.view()) == RFK_OK, "%s", rfk_last_error());
    const int bits = dtype == RFK_BFLOAT16 ? 8 : dtype == RFK_FLOAT16 ? 11 : 24;
    for (int64_t i = 0; i < out.numel(); ++i) {
      double truth;
      if (distribution == RFK_NORMAL) {
        truth = stored(dtype, static_cast<double>(noise.normal(i, out.per_sample())));
      } else {
        uint32_t words[4];
        noise.words(i, out.per_sample(), words);
        truth = std::ldexp(words[noise.lane(i, out.per_sample())] >> (32 - bits), -bits);
        CHECK(out.get(i) < 1.0, "a uniform of 1, %s", level);
      }
      CHECK(same(out.get(i), truth), "element %lld, %s: %.9g, expected %.9g", static_cast<long long>(i), level, out.get(i),
            truth);
    }
    CHECK(out.gaps_untouched(), "memory between the elements, %s", level);
  });
}

// Normals against Box-Muller in double.
void box_muller() {
  Dice dice{5};
  for (int i = 0; i < 200000; ++i) {
    const uint32_t w0 = static_cast<uint32_t>(dice.next()), w1 = static_cast<uint32_t>(dice.next());
    float z[4];
    rfk::normals_from_words(w0, w1, w0, w1, z[0], z[1], z[2], z[3]);
    const double radius = std::sqrt(-2.0 * std::log(((w0 >> 8) + 1) * 0x1p-24)), angle = 2.0 * M_PI * (w1 >> 8) * 0x1p-24;
    CHECK(std::fabs(static_cast<double>(z[0]) - radius * std::cos(angle)) <= 4 * 0x1p-24 * radius + 1e-12, "words %08x %08x",
          w0, w1);
    CHECK(std::fabs(static_cast<double>(z[1]) - radius * std::sin(angle)) <= 4 * 0x1p-24 * radius + 1e-12, "words %08x %08x",
          w0, w1);
    CHECK(z[0] == z[2] && z[1] == z[3], "pairs");
  }
}

}  // namespace

int main(int argc, char** argv) {
  known_answers();
  box_muller();
  Dice dice{3};
  for (int round = 0; round < rounds(argc, argv); ++round) {
    for (int dtype : {RFK_FLOAT32, RFK_FLOAT64, RFK_BFLOAT16, RFK_FLOAT16}) one(dice, dtype);
  }
  std::puts("random: passed");
  return 0;
}
