// Which sentences make which training sample: the part of a dataset's index that is a loop over
// every sentence of the corpus. megatron/data/index_builder.py holds the twin in Python that gives
// the same numbers and is the specification; tests compare the two.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15u;

// Output number `n` of the splitmix64 generator started at `key` (Steele, Lea and Flood, 2014).
// Unlike the distributions of the standard library it gives the same numbers everywhere.
std::uint64_t random64(std::uint64_t key, std::uint64_t n) {
  std::uint64_t x = key + kGolden * (n + 1);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

struct Row {
  std::int64_t first;
  std::int64_t end;
  std::int64_t target;
};

struct Rule {
  std::int64_t max_tokens;
  std::int64_t min_sentences;
  std::uint64_t short_threshold;  // of 2^32: how often a sample is to be shorter

  std::int64_t target(std::uint64_t random) const {
    if ((random >> 32) >= short_threshold) return max_tokens;
    const std::uint64_t choices = static_cast<std::uint64_t>(max_tokens - 1);
    return 2 + static_cast<std::int64_t>(((random & 0xFFFFFFFFu) * choices) >> 32);
  }
};

template <typename Documents, typename Sizes>
void append_epoch(const Documents& documents, const Sizes& sizes, const Rule& rule,
                  std::uint64_t key, std::vector<Row>& rows) {
  const std::size_t before = rows.size();
  const std::int64_t min_sentences = rule.min_sentences;
  for (py::ssize_t d = 0; d + 1 < documents.shape(0); ++d) {
    const std::int64_t document_end = documents(d + 1);
    std::int64_t first = documents(d);
    if (document_end - first < min_sentences) continue;
    std::int64_t target = rule.target(random64(key, rows.size() - before));
    std::int64_t tokens = 0;
    for (std::int64_t i = first; i < document_end; ++i) {
      tokens += sizes(i);
      const std::int64_t remaining = document_end - i - 1;
      const bool full = tokens >= target && i + 1 - first >= min_sentences &&
                        remaining >= min_sentences;
      if (!full && remaining > 0) continue;
      rows.push_back({first, i + 1, target});
      target = rule.target(random64(key, rows.size() - before));
      first = i + 1;
      tokens = 0;
    }
  }
}

void shuffle_from(std::size_t begin, std::uint64_t key, std::vector<Row>& rows) {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> order(rows.size() - begin);
  for (std::uint64_t i = 0; i < order.size(); ++i) order[i] = {random64(key, i), i};
  std::sort(order.begin(), order.end());
  std::vector<Row> shuffled;
  shuffled.reserve(order.size());
  for (const auto& [random, i] : order) shuffled.push_back(rows[begin + i]);
  std::copy(shuffled.begin(), shuffled.end(), rows.begin() + static_cast<std::ptrdiff_t>(begin));
}

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
using Int32Array = py::array_t<std::int32_t, py::array::c_style>;

Int64Array bert_samples(const Int64Array& documents, const Int32Array& sizes,
                        std::int64_t max_tokens, std::int64_t min_sentences,
                        std::uint64_t short_threshold, std::uint64_t seed,
                        std::uint64_t first_epoch, std::uint64_t epochs) {
  const auto boundaries = documents.unchecked<1>();
  const auto lengths = sizes.unchecked<1>();
  for (py::ssize_t d = 0; d < boundaries.shape(0); ++d) {
    const std::int64_t previous = d > 0 ? boundaries(d - 1) : 0;
    if (boundaries(d) < previous || boundaries(d) > lengths.shape(0)) {
      throw std::invalid_argument("document boundaries fall or pass the number of sentences");
    }
  }
  const Rule rule{max_tokens, min_sentences, short_threshold};
  std::vector<Row> rows;
  {
    py::gil_scoped_release release;
    for (std::uint64_t epoch = first_epoch; epoch < first_epoch + epochs; ++epoch) {
      const std::size_t begin = rows.size();
      append_epoch(boundaries, lengths, rule, random64(random64(seed, 0), epoch), rows);
      shuffle_from(begin, random64(random64(seed, 1), epoch), rows);
    }
  }
  Int64Array result({static_cast<py::ssize_t>(rows.size()), py::ssize_t{3}});
  auto out = result.mutable_unchecked<2>();
  for (py::ssize_t i = 0; i < out.shape(0); ++i) {
    out(i, 0) = rows[static_cast<std::size_t>(i)].first;
    out(i, 1) = rows[static_cast<std::size_t>(i)].end;
    out(i, 2) = rows[static_cast<std::size_t>(i)].target;
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_index, m) {
  m.doc() = "Loops over every sentence of a corpus, for megatron.data.index_builder.";
  m.def("bert_samples", &bert_samples, py::arg("documents"), py::arg("sizes"),
        py::arg("max_tokens"), py::arg("min_sentences"), py::arg("short_threshold"),
        py::arg("seed"), py::arg("first_epoch"), py::arg("epochs"),
        "Rows [first sentence, end, target tokens] of the samples of some epochs, each shuffled.");
}
