// Many tensors in one launch. Each is cut into tiles of one length, and the tiles are numbered
// through all tensors: two tensors of 7 and one of 5 tiles are tiles 0 to 6, 7 to 13 and 14 to 18.
// The addresses travel among the kernel's arguments, so that nothing has to be copied to the device
// before, and nothing has to be kept there.

#pragma once

#include "dispatch.cuh"

namespace megatron {

constexpr int kTile = 4096;     // elements
constexpr int kTogether = 64;   // rows of a launch, whose arguments are at most 4 KB
constexpr int kInBlock = 256;   // threads that share a tile

// What is worked on together: in each row kParts tensors of equally many elements.
template <int kParts>
struct Rows {
  uintptr_t address[kTogether][kParts];
  int64_t elements[kTogether];
  int32_t first[kTogether];  // number of the row's first tile
  int32_t count, tiles;
};

struct Tile {
  int row;
  int64_t begin, end;  // elements
};

// The last row whose first tile is not beyond `number`, which is never one without tiles.
template <int kParts>
__device__ __forceinline__ Tile find(const Rows<kParts>& rows, int number) {
  int row = 0;
  for (int beyond = rows.count; beyond - row > 1;) {
    int middle = (row + beyond) / 2;
    if (rows.first[middle] <= number)
      row = middle;
    else
      beyond = middle;
  }
  int64_t begin = static_cast<int64_t>(number - rows.first[row]) * kTile;
  int64_t end = begin + kTile < rows.elements[row] ? begin + kTile : rows.elements[row];
  return {row, begin, end};
}

// Whether all tensors can be read in packs of V elements of at most 16 bytes.
template <int V, int kParts>
bool all_fit(const Rows<kParts>& rows) {
  for (int row = 0; row < rows.count; row++) {
    if (rows.elements[row] % V) return false;
    for (int part = 0; part < kParts; part++)
      if (rows.address[row][part] % 16) return false;
  }
  return true;
}

// Calls `work` with up to kTogether rows at a time, and with how many came before them, until all
// are done or it returns an error. `table`, on the host, has in each row kParts addresses and the
// number of elements.
template <int kParts, typename Work>
int together(const void* table, int64_t count, Work work) {
  const int64_t* entry = static_cast<const int64_t*>(table);
  for (int64_t before = 0; before < count; before += kTogether) {
    Rows<kParts> rows = {};
    for (; rows.count < kTogether && before + rows.count < count; rows.count++) {
      for (int part = 0; part < kParts; part++)
        rows.address[rows.count][part] = static_cast<uintptr_t>(*entry++);
      rows.elements[rows.count] = *entry++;
      rows.first[rows.count] = rows.tiles;
      rows.tiles += static_cast<int32_t>(divide_up(rows.elements[rows.count], kTile));
    }
    if (rows.tiles == 0) continue;
    if (int error = work(rows, before)) return error;
  }
  return 0;
}

}  // namespace megatron
