#pragma once

#include "memory/status.h"
#include "tools/trace/mapped_file.h"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvtier {

/// One tensor of a safetensors file. View: valid while its `SafetensorsFile` lives.
struct TensorView {
  std::string name;
  /// As safetensors writes it: "F16", "I64", ...
  std::string_view dtype;
  std::size_t element_bytes = 0;
  std::vector<std::uint64_t> shape;
  /// Row-major, little-endian, at an address that is a multiple of `element_bytes`.
  std::span<const std::byte> bytes;

  std::uint64_t element_count() const { return bytes.size() / element_bytes; }
};

/// "[7547, 3, 64]".
std::string to_string(std::span<const std::uint64_t> shape);

/// A safetensors file: 8 bytes of header length, a JSON header, then the tensors without gaps.
///
/// Opening checks the whole structure (lengths, types, shapes, offsets without hole or overlap) and
/// reads no tensor. Tensors are views of the mapped file; one that does not start at a multiple of
/// its element size is copied to aligned memory instead. Immutable afterwards and safe to share
/// between threads. Move-only; views stay valid when it moves.
class SafetensorsFile {
 public:
  /// Fails with `not_found`, `io_error`, `no_space` (memory) or, for wrong content, `corrupt`.
  static Result<SafetensorsFile> open(const std::string& path);
  static Result<SafetensorsFile> open(MappedFile file);

  const std::string& path() const { return file_.path(); }
  /// In the order in which they lie in the file.
  const std::vector<TensorView>& tensors() const { return tensors_; }
  /// None when there is no such tensor.
  const TensorView* find(std::string_view name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// Bytes that had to be copied for alignment; 0 for files as we write them.
  std::size_t copied_bytes() const { return copied_bytes_; }

 private:
  struct FreeBytes {
    void operator()(std::byte* bytes) const { std::free(bytes); }
  };

  explicit SafetensorsFile(MappedFile file) : file_(std::move(file)) {}
  Status read_header(std::span<const std::byte> header, std::span<const std::byte> data);
  Status check_offsets(std::size_t data_bytes) const;
  Status align_tensors();

  MappedFile file_;
  std::vector<TensorView> tensors_;
  std::map<std::string, std::string> metadata_;
  std::vector<std::unique_ptr<std::byte[], FreeBytes>> copies_;
  std::size_t copied_bytes_ = 0;
};

}  // namespace kvtier
