#include "device.h"

namespace fastagg::cuda {

int architecture() { return limits().architecture; }

}  // namespace fastagg::cuda
