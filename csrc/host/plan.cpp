#include "plan.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fastagg::host {
namespace {

namespace py = pybind11;
using Float64Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

constexpr std::int64_t kTableColumns = 6;
constexpr std::int64_t kSlotColumns = 9;

struct Client {
  Int64Array table;
  Int64Array modules;
  Float64Array scales;
};

[[noreturn]] void refuse(std::size_t client, const std::string& what) {
  throw std::invalid_argument("build_plan: client " + std::to_string(client) + ": " + what);
}

Client read_client(std::size_t k, const py::handle& table, const py::handle& modules,
                   const py::handle& scales) {
  Client client{Int64Array::ensure(table), Int64Array::ensure(modules),
                Float64Array::ensure(scales)};
  if (!client.table || !client.modules || !client.scales) {
    PyErr_Clear();
    refuse(k, "expected int64 tables and modules and float64 scales");
  }
  if (client.table.ndim() != 2 || client.table.shape(1) != kTableColumns) {
    refuse(k, "the slot table must have the shape (J, 6)");
  }
  const auto slots = client.table.shape(0);
  if (client.modules.ndim() != 1 || client.modules.shape(0) != slots || client.scales.ndim() != 1 ||
      client.scales.shape(0) != slots) {
    refuse(k, "modules and scales must have one entry for each of the " + std::to_string(slots) +
                  " slots");
  }
  return client;
}

void check_buckets(const Int64Array& bucket, const Int64Array& place, const Int64Array& lengths) {
  if (bucket.ndim() != 1 || place.ndim() != 1 || lengths.ndim() != 1 ||
      bucket.shape(0) != place.shape(0)) {
    throw std::invalid_argument(
        "build_plan: bucket and place must be vectors of one length, lengths a vector");
  }
  for (py::ssize_t n = 0; n < lengths.shape(0); ++n) {
    if (lengths.data()[n] < 0)
      throw std::invalid_argument("build_plan: a bucket has a negative length");
  }
  for (py::ssize_t m = 0; m < bucket.shape(0); ++m) {
    const auto n = bucket.data()[m];
    if (n < 0 || n >= lengths.shape(0) || place.data()[m] < 0 ||
        place.data()[m] >= lengths.data()[n]) {
      throw std::invalid_argument("build_plan: module " + std::to_string(m) +
                                  " lies outside its bucket");
    }
  }
}

}  // namespace

py::list build_plan(const py::list& tables, const py::list& modules, const py::list& scales,
                    const Int64Array& bucket, const Int64Array& place, const Int64Array& lengths) {
  if (tables.size() != modules.size() || tables.size() != scales.size()) {
    throw std::invalid_argument(
        "build_plan: tables, modules and scales must have one entry for each client");
  }
  check_buckets(bucket, place, lengths);
  const std::int64_t module_count = bucket.shape(0);

  std::vector<Client> clients;
  clients.reserve(tables.size());
  std::vector<std::int64_t> slots_of(static_cast<std::size_t>(module_count), 0);
  for (std::size_t k = 0; k < tables.size(); ++k) {
    clients.push_back(read_client(k, tables[k], modules[k], scales[k]));
    const auto& client = clients.back();
    for (py::ssize_t j = 0; j < client.modules.shape(0); ++j) {
      const auto module = client.modules.data()[j];
      if (module < -1 || module >= module_count)
        refuse(k, "module number " + std::to_string(module) + " is unknown");
      if (client.table.data()[j * kTableColumns + 4] < 0) refuse(k, "a rank is negative");
      if (module >= 0) ++slots_of[static_cast<std::size_t>(module)];
    }
  }

  // A counting sort: every module knows where its slots begin before any slot is written.
  struct Output {
    Int64Array slots, first, ranks;
    Float64Array scale;
  };
  std::vector<Output> outputs;
  std::vector<std::int64_t> next(static_cast<std::size_t>(module_count), 0);
  for (py::ssize_t n = 0; n < lengths.shape(0); ++n) {
    Output output;
    output.first = Int64Array(lengths.data()[n] + 1);
    output.ranks = Int64Array(lengths.data()[n]);
    for (py::ssize_t j = 0; j <= lengths.data()[n]; ++j) output.first.mutable_data()[j] = 0;
    for (py::ssize_t j = 0; j < lengths.data()[n]; ++j) output.ranks.mutable_data()[j] = 0;
    outputs.push_back(std::move(output));
  }
  for (std::int64_t m = 0; m < module_count; ++m) {
    outputs[static_cast<std::size_t>(bucket.data()[m])].first.mutable_data()[place.data()[m] + 1] +=
        slots_of[static_cast<std::size_t>(m)];
  }
  for (py::ssize_t n = 0; n < lengths.shape(0); ++n) {
    auto& output = outputs[static_cast<std::size_t>(n)];
    auto* first = output.first.mutable_data();
    for (py::ssize_t j = 0; j < lengths.data()[n]; ++j) first[j + 1] += first[j];
    output.slots =
        Int64Array({static_cast<py::ssize_t>(first[lengths.data()[n]]), py::ssize_t{kSlotColumns}});
    output.scale = Float64Array(first[lengths.data()[n]]);
  }
  for (std::int64_t m = 0; m < module_count; ++m) {
    next[static_cast<std::size_t>(m)] =
        outputs[static_cast<std::size_t>(bucket.data()[m])].first.data()[place.data()[m]];
  }

  for (std::size_t k = 0; k < clients.size(); ++k) {
    const auto& client = clients[k];
    const auto flat = static_cast<std::int64_t>(k);
    for (py::ssize_t j = 0; j < client.modules.shape(0); ++j) {
      const auto module = client.modules.data()[j];
      if (module < 0) continue;
      const auto* row = client.table.data() + j * kTableColumns;
      auto& output = outputs[static_cast<std::size_t>(bucket.data()[module])];
      const auto at = next[static_cast<std::size_t>(module)]++;
      auto& used = output.ranks.mutable_data()[place.data()[module]];
      const std::int64_t slot[kSlotColumns] = {
          place.data()[module], used, row[4], flat, row[0], row[1], flat, row[2], row[3]};
      std::copy(slot, slot + kSlotColumns, output.slots.mutable_data() + at * kSlotColumns);
      output.scale.mutable_data()[at] = client.scales.data()[j];
      used += row[4];
    }
  }

  py::list result;
  for (auto& output : outputs) {
    result.append(py::make_tuple(output.slots, output.scale, output.first, output.ranks));
  }
  return result;
}

}  // namespace fastagg::host
