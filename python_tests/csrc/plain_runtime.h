// How the test's runtime runs tasks. Results must have equal bits whichever it is.
#pragma once

namespace fastagg::cpu {

enum class Order { Forward, Reverse, Shuffled, Threads };
extern Order order;

}  // namespace fastagg::cpu
