// rotation.h: the fixed random signs that go before the Hadamard transform of queries and keys.
#ifndef RFK_CORE_ROTATION_H_
#define RFK_CORE_ROTATION_H_

#include <cstdint>

namespace rfk {

// philox4x32-10 of counters (0,0,0,0) and (1,0,0,0) under key (0,0); bit d % 32 of word d / 32 set: channel d is negated.
constexpr uint32_t kSignWords[8] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u,
                                    0xf8e4cca4u, 0x5cb200dbu, 0xb1a574ebu, 0x097eff67u};

}  // namespace rfk

#endif  // RFK_CORE_ROTATION_H_
