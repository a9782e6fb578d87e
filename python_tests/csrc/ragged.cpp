// The maths that CPU and CUDA kernels share, as a filter: binary in, binary out.
#include <cstdio>
#include <cstring>
#include <vector>

#include "ragged/balance.h"
#include "ragged/dtype.h"
#include "ragged/philox.h"
#include "ragged/tables.h"

namespace {

template <class T>
std::vector<T> read_all() {
  std::vector<T> values;
  T value;
  while (std::fread(&value, sizeof value, 1, stdin) == 1) values.push_back(value);
  return values;
}

template <class T>
void write_all(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

// All 65536 halves as floats, then all 65536 bfloat16s.
void widen() {
  std::vector<float> out;
  for (uint32_t bits = 0; bits < 65536; ++bits)
    out.push_back(fastagg::half_to_float(static_cast<uint16_t>(bits)));
  for (uint32_t bits = 0; bits < 65536; ++bits)
    out.push_back(fastagg::bfloat16_to_float(static_cast<uint16_t>(bits)));
  write_all(out);
}

// Floats to halves, then to bfloat16s.
void narrow() {
  const auto in = read_all<float>();
  std::vector<uint16_t> out;
  for (const float value : in) out.push_back(fastagg::float_to_half(value));
  for (const float value : in) out.push_back(fastagg::float_to_bfloat16(value));
  write_all(out);
}

// Triples (key, counter low, counter high) to four words each.
void philox() {
  const auto in = read_all<uint64_t>();
  std::vector<uint32_t> out;
  for (size_t i = 0; i + 2 < in.size(); i += 3) {
    const fastagg::Philox4 block = fastagg::philox(in[i], in[i + 1], in[i + 2]);
    out.insert(out.end(), block.word, block.word + 4);
  }
  write_all(out);
}

// Triples (seed, stream, block) to 128 signs each.
void signs() {
  const auto in = read_all<uint64_t>();
  std::vector<float> out;
  for (size_t i = 0; i + 2 < in.size(); i += 3) {
    const fastagg::Philox4 block = fastagg::rademacher_block(in[i], in[i + 1], in[i + 2]);
    for (int64_t bit = 0; bit < fastagg::kSignsPerBlock; ++bit)
      out.push_back(fastagg::rademacher_sign(block, bit));
  }
  write_all(out);
}

// Triples (coefficient, norm of a, norm of b) to (alpha, beta, unit scale of a).
void balance() {
  const auto in = read_all<double>();
  std::vector<double> out;
  for (size_t i = 0; i + 2 < in.size(); i += 3) {
    const fastagg::Balance found = fastagg::balance(in[i], in[i + 1], in[i + 2]);
    out.insert(out.end(), {found.alpha, found.beta, fastagg::unit_scale(in[i + 1])});
  }
  write_all(out);
}

void sizes() {
  std::vector<int64_t> out;
  for (int64_t code = 0; code < 4; ++code)
    out.push_back(fastagg::element_size(static_cast<fastagg::DType>(code)));
  out.insert(out.end(),
             {sizeof(fastagg::Span), sizeof(fastagg::StackSlot), sizeof(fastagg::HandOutSlot)});
  write_all(out);
}

}  // namespace

int main(int argc, char** argv) {
  const struct {
    const char* name;
    void (*function)();
  } modes[] = {{"widen", widen}, {"narrow", narrow},   {"philox", philox},
               {"signs", signs}, {"balance", balance}, {"sizes", sizes}};
  for (const auto& mode : modes)
    if (argc == 2 && std::strcmp(argv[1], mode.name) == 0) {
      mode.function();
      return 0;
    }
  std::fprintf(stderr, "unknown mode\n");
  return 2;
}
