// Which pieces of a corpus make which training sample: the loops over whole datasets, as
// megatron/data/index_builder.py describes them. megatron/data/index_twin.py gives the same numbers
// in Python and is the specification; tests compare the two.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15u;
constexpr std::uint64_t kLengths = 0, kSamples = 1, kDocuments = 2;  // streams of random numbers

// Output number `n` of the splitmix64 generator started at `key` (Steele, Lea and Flood, 2014).
// Unlike the distributions of the standard library it gives the same numbers everywhere.
std::uint64_t random64(std::uint64_t key, std::uint64_t n) {
  std::uint64_t x = key + kGolden * (n + 1);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Where the generator of a stream starts in an epoch.
std::uint64_t key_of(std::uint64_t seed, std::uint64_t stream, std::uint64_t epoch) {
  return random64(random64(seed, stream), epoch);
}

// The numbers below `count` in the order of the random numbers that start at `key`.
std::vector<std::int64_t> shuffled(std::size_t count, std::uint64_t key) {
  std::vector<std::pair<std::uint64_t, std::int64_t>> draws(count);
  for (std::size_t i = 0; i < count; ++i) {
    draws[i] = {random64(key, i), static_cast<std::int64_t>(i)};
  }
  std::sort(draws.begin(), draws.end());
  std::vector<std::int64_t> order(count);
  for (std::size_t i = 0; i < count; ++i) order[i] = draws[i].second;
  return order;
}

template <typename Row>
void shuffle_from(std::size_t begin, std::uint64_t key, std::vector<Row>& rows) {
  const std::vector<Row> before(rows.begin() + static_cast<std::ptrdiff_t>(begin), rows.end());
  auto out = rows.begin() + static_cast<std::ptrdiff_t>(begin);
  for (const std::int64_t i : shuffled(before.size(), key)) {
    *out++ = before[static_cast<std::size_t>(i)];
  }
}

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
using Int32Array = py::array_t<std::int32_t, py::array::c_style>;

// Rows of 64-bit integers as a two-dimensional array.
template <typename Row>
Int64Array to_array(const std::vector<Row>& rows) {
  constexpr std::size_t columns = sizeof(Row) / sizeof(std::int64_t);
  static_assert(sizeof(Row) == columns * sizeof(std::int64_t));
  Int64Array result({static_cast<py::ssize_t>(rows.size()), static_cast<py::ssize_t>(columns)});
  if (!rows.empty()) std::memcpy(result.mutable_data(), rows.data(), rows.size() * sizeof(Row));
  return result;
}

struct Sentences {
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
                  std::uint64_t key, std::vector<Sentences>& rows) {
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

Int64Array sentence_samples(const Int64Array& documents, const Int32Array& sizes,
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
  std::vector<Sentences> rows;
  {
    py::gil_scoped_release release;
    for (std::uint64_t epoch = first_epoch; epoch < first_epoch + epochs; ++epoch) {
      const std::size_t begin = rows.size();
      append_epoch(boundaries, lengths, rule, key_of(seed, kLengths, epoch), rows);
      shuffle_from(begin, key_of(seed, kSamples, epoch), rows);
    }
  }
  return to_array(rows);
}

Int64Array document_order(std::size_t documents, std::uint64_t seed, std::uint64_t first_epoch,
                          std::uint64_t epochs) {
  std::vector<std::int64_t> all;
  {
    py::gil_scoped_release release;
    all.reserve(epochs * documents);
    for (std::uint64_t epoch = first_epoch; epoch < first_epoch + epochs; ++epoch) {
      const auto order = shuffled(documents, key_of(seed, kDocuments, epoch));
      all.insert(all.end(), order.begin(), order.end());
    }
  }
  return Int64Array(static_cast<py::ssize_t>(all.size()), all.data());
}

// Walks through the documents of all epochs from the start of one on.
template <typename Lengths>
class Stream {
 public:
  Stream(const Lengths& lengths, std::int64_t tokens, std::uint64_t seed, std::uint64_t epoch)
      : lengths_(lengths), seed_(seed), epoch_(epoch),
        begin_(static_cast<std::int64_t>(epoch) * tokens) {
    draw_order();
  }

  // The document that holds token `token` of the stream, which may not lie before the last one
  // asked for: its place in the stream, and the tokens of it that come before.
  std::array<std::int64_t, 2> find(std::int64_t token) {
    while (begin_ + length() <= token) {
      begin_ += length();
      if (++place_ == order_.size()) {
        ++epoch_;
        draw_order();
      }
    }
    return {static_cast<std::int64_t>(epoch_ * order_.size() + place_), token - begin_};
  }

 private:
  void draw_order() {
    order_ = shuffled(static_cast<std::size_t>(lengths_.shape(0)),
                      key_of(seed_, kDocuments, epoch_));
    place_ = 0;
  }

  std::int64_t length() const { return lengths_(order_[place_]); }

  const Lengths& lengths_;
  std::uint64_t seed_;
  std::uint64_t epoch_;
  std::int64_t begin_;  // the first token of the document at place_
  std::size_t place_ = 0;
  std::vector<std::int64_t> order_;
};

Int64Array token_samples(const Int64Array& lengths, std::int64_t seq_length, std::uint64_t seed,
                         std::uint64_t first_epoch, std::uint64_t epochs) {
  const auto sizes = lengths.unchecked<1>();
  std::int64_t tokens = 0;
  for (py::ssize_t d = 0; d < sizes.shape(0); ++d) {
    if (sizes(d) < 0) throw std::invalid_argument("a document has a negative length");
    tokens += sizes(d);
  }
  if (seq_length < 1 || tokens <= seq_length) {
    throw std::invalid_argument("the documents hold no sample");
  }
  std::vector<std::array<std::int64_t, 2>> rows;
  {
    py::gil_scoped_release release;
    // Samples whose last token lies before the end of `epoch` - 1.
    const auto samples_before = [&](std::uint64_t epoch) {
      return epoch == 0 ? 0 : (static_cast<std::int64_t>(epoch) * tokens - 1) / seq_length;
    };
    // The first sample may begin in the epoch before its last token.
    Stream stream(sizes, tokens, seed, first_epoch > 0 ? first_epoch - 1 : 0);
    for (std::uint64_t epoch = first_epoch; epoch < first_epoch + epochs; ++epoch) {
      const std::size_t begin = rows.size();
      for (std::int64_t i = samples_before(epoch); i < samples_before(epoch + 1); ++i) {
        rows.push_back(stream.find(i * seq_length));
      }
      shuffle_from(begin, key_of(seed, kSamples, epoch), rows);
    }
  }
  return to_array(rows);
}

__extension__ typedef unsigned __int128 Wide;  // holds a number of samples times a weight

using Queue = std::priority_queue<std::pair<Wide, std::size_t>,
                                  std::vector<std::pair<Wide, std::size_t>>, std::greater<>>;

Int64Array interleave(const std::vector<std::uint64_t>& weights,
                      const std::vector<std::uint64_t>& counts, std::size_t samples) {
  const Wide total = std::accumulate(weights.begin(), weights.end(), Wide{0});
  if (weights.empty() || counts.size() != weights.size() ||
      *std::min_element(weights.begin(), weights.end()) == 0 || total > Wide{1} << 62) {
    throw std::invalid_argument("a blend needs a count for each of its weights, which are above 0");
  }
  std::vector<std::array<std::int64_t, 2>> rows;
  {
    py::gil_scoped_release release;
    rows.reserve(samples);
    std::vector<std::uint64_t> numbers = counts;  // of the next sample of each dataset
    Queue waiting, ready;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      waiting.emplace(numbers[i] * total / weights[i], i);
    }
    const Wide first = std::accumulate(counts.begin(), counts.end(), Wide{0});
    for (Wide n = first; n < first + samples; ++n) {
      while (!waiting.empty() && waiting.top().first <= n) {
        const std::size_t i = waiting.top().second;
        waiting.pop();
        ready.emplace(((numbers[i] + Wide{1}) * total + weights[i] - 1) / weights[i], i);
      }
      const std::size_t i = ready.top().second;
      ready.pop();
      rows.push_back({static_cast<std::int64_t>(i), static_cast<std::int64_t>(numbers[i])});
      ++numbers[i];
      waiting.emplace(numbers[i] * total / weights[i], i);
    }
  }
  return to_array(rows);
}

}  // namespace

PYBIND11_MODULE(_index, m) {
  m.doc() = "Loops over whole datasets, for megatron.data.index_builder.";
  m.def("sentence_samples", &sentence_samples, py::arg("documents"), py::arg("sizes"),
        py::arg("max_tokens"), py::arg("min_sentences"), py::arg("short_threshold"),
        py::arg("seed"), py::arg("first_epoch"), py::arg("epochs"),
        "Rows [first sentence, end, target tokens] of the samples of some epochs, each shuffled.");
  m.def("document_order", &document_order, py::arg("documents"), py::arg("seed"),
        py::arg("first_epoch"), py::arg("epochs"),
        "The numbers of all documents in the order of each epoch.");
  m.def("token_samples", &token_samples, py::arg("lengths"), py::arg("seq_length"),
        py::arg("seed"), py::arg("first_epoch"), py::arg("epochs"),
        "Rows [place of the document, offset] of the samples of some epochs, each shuffled.");
  m.def("interleave", &interleave, py::arg("weights"), py::arg("counts"), py::arg("samples"),
        "Rows [dataset, its sample] of the next samples of a blend.");
}
