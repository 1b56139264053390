#include "tools/trace/safetensors.h"

#include "tools/trace/json_document.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

namespace kvtier {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

constexpr std::size_t kLengthBytes = 8;
// The format's own bound: a header beyond it is an attack or not a safetensors file.
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
constexpr std::size_t kCopyAlignment = 64;

struct ElementType {
  std::string_view name;
  std::size_t bytes;
};
constexpr ElementType kElementTypes[] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
    {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
    {"U32", 4},  {"F32", 4}, {"I64", 8}, {"U64", 8},     {"F64", 8},
};
constexpr std::string_view kElementTypeNames =
    "one of BOOL, U8, I8, F8_E4M3, F8_E5M2, I16, U16, F16, BF16, I32, U32, F32, I64, U64, F64";

// Offsets and sizes in a header are any 64-bit numbers; ranges are checked afterwards.
constexpr std::uint64_t kAnyCount = std::numeric_limits<std::uint64_t>::max();

Result<std::vector<std::uint64_t>> read_counts(const JsonField& field) {
  KVTIER_ASSIGN_OR_RETURN(const std::vector<JsonField> elements, field.elements());
  std::vector<std::uint64_t> counts;
  for (const JsonField& element : elements) {
    KVTIER_ASSIGN_OR_RETURN(const std::uint64_t count, element.as_count(0, kAnyCount));
    counts.push_back(count);
  }
  return counts;
}

// Bytes of a tensor, or a failure when they do not fit 64 bits.
Result<std::uint64_t> shape_bytes(const JsonField& shape_field,
                                  std::span<const std::uint64_t> shape, std::size_t element_bytes) {
  std::uint64_t product = element_bytes;
  for (const std::uint64_t size : shape) {
    if (__builtin_mul_overflow(product, size, &product)) {
      return shape_field.mismatch("a shape whose byte count fits 64 bits");
    }
  }
  return product;
}

Result<TensorView> read_tensor(const std::string& name, const JsonField& entry,
                               std::span<const std::byte> data) {
  TensorView tensor;
  tensor.name = name;
  KVTIER_ASSIGN_OR_RETURN(const JsonField dtype_field, entry.member("dtype"));
  KVTIER_ASSIGN_OR_RETURN(const std::string dtype, dtype_field.as_string());
  const auto* type = std::find_if(std::begin(kElementTypes), std::end(kElementTypes),
                                  [&](const ElementType& known) { return known.name == dtype; });
  if (type == std::end(kElementTypes)) return dtype_field.mismatch(kElementTypeNames);
  tensor.dtype = type->name;
  tensor.element_bytes = type->bytes;

  KVTIER_ASSIGN_OR_RETURN(const JsonField shape_field, entry.member("shape"));
  KVTIER_ASSIGN_OR_RETURN(tensor.shape, read_counts(shape_field));
  KVTIER_ASSIGN_OR_RETURN(const std::uint64_t expected_bytes,
                          shape_bytes(shape_field, tensor.shape, tensor.element_bytes));

  KVTIER_ASSIGN_OR_RETURN(const JsonField offsets_field, entry.member("data_offsets"));
  KVTIER_ASSIGN_OR_RETURN(const std::vector<std::uint64_t> offsets, read_counts(offsets_field));
  if (offsets.size() != 2 || offsets[0] > offsets[1]) {
    return offsets_field.mismatch("[begin, end] with begin <= end");
  }
  if (offsets[1] > data.size()) {
    return offsets_field.mismatch(fmt::format("an end of at most {}", data.size()),
                                  "is the file complete?");
  }
  if (offsets[1] - offsets[0] != expected_bytes) {
    return offsets_field.mismatch(
        fmt::format("{} bytes for {} {}", expected_bytes, tensor.dtype, to_string(tensor.shape)));
  }
  tensor.bytes = data.subspan(offsets[0], offsets[1] - offsets[0]);
  return tensor;
}

}  // namespace

std::string to_string(std::span<const std::uint64_t> shape) {
  std::string text = "[";
  for (const std::uint64_t size : shape) {
    text += fmt::format("{}{}", text.size() > 1 ? ", " : "", size);
  }
  return text + "]";
}

Result<SafetensorsFile> SafetensorsFile::open(const std::string& path) {
  KVTIER_ASSIGN_OR_RETURN(MappedFile file, MappedFile::open(path));
  return open(std::move(file));
}

Result<SafetensorsFile> SafetensorsFile::open(MappedFile mapped) {
  SafetensorsFile file(std::move(mapped));
  const std::span<const std::byte> bytes = file.file_.bytes();
  if (bytes.size() < kLengthBytes) {
    return input_error(file.path(), "size", fmt::format("{} bytes", bytes.size()),
                       fmt::format("at least {}", kLengthBytes), "is the file complete?");
  }
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), kLengthBytes);
  const std::uint64_t most = std::min<std::uint64_t>(bytes.size() - kLengthBytes, kMaxHeaderBytes);
  if (header_bytes > most) {
    return input_error(file.path(), "header_length", fmt::format("{}", header_bytes),
                       fmt::format("at most {}", most),
                       "the file is incomplete or no safetensors file");
  }
  const auto header = bytes.subspan(kLengthBytes, header_bytes);
  const auto data = bytes.subspan(kLengthBytes + header_bytes);
  KVTIER_RETURN_IF_ERROR(file.read_header(header, data));
  KVTIER_RETURN_IF_ERROR(file.check_offsets(data.size()));
  KVTIER_RETURN_IF_ERROR(file.align_tensors());
  return file;
}

const TensorView* SafetensorsFile::find(std::string_view name) const {
  const auto found = std::find_if(tensors_.begin(), tensors_.end(),
                                  [&](const TensorView& tensor) { return tensor.name == name; });
  return found == tensors_.end() ? nullptr : &*found;
}

Status SafetensorsFile::read_header(std::span<const std::byte> header,
                                    std::span<const std::byte> data) {
  KVTIER_ASSIGN_OR_RETURN(const nlohmann::json document, parse_json(header, path(), "header"));
  const JsonField root(document, path());
  if (!document.is_object()) return root.mismatch("a header that is an object");
  for (const auto& [name, value] : document.items()) {
    KVTIER_ASSIGN_OR_RETURN(const JsonField entry, root.member(name));
    if (name != "__metadata__") {
      KVTIER_ASSIGN_OR_RETURN(TensorView tensor, read_tensor(name, entry, data));
      tensors_.push_back(std::move(tensor));
      continue;
    }
    if (!value.is_object()) return entry.mismatch("an object");
    for (const auto& [key, unused] : value.items()) {
      KVTIER_ASSIGN_OR_RETURN(const JsonField text, entry.member(key));
      KVTIER_ASSIGN_OR_RETURN(metadata_[key], text.as_string());
    }
  }
  // Empty tensors share their offset with a neighbour: shorter first keeps the walk monotone.
  std::stable_sort(tensors_.begin(), tensors_.end(), [](const TensorView& a, const TensorView& b) {
    return std::pair(a.bytes.data(), a.bytes.size()) < std::pair(b.bytes.data(), b.bytes.size());
  });
  return {};
}

Status SafetensorsFile::check_offsets(std::size_t data_bytes) const {
  std::size_t next = 0;
  const std::byte* data = file_.bytes().data() + (file_.bytes().size() - data_bytes);
  for (const TensorView& tensor : tensors_) {
    const auto begin = static_cast<std::size_t>(tensor.bytes.data() - data);
    if (begin != next) {
      return input_error(path(), tensor.name + ".data_offsets", fmt::format("begin {}", begin),
                         fmt::format("begin {}, where the tensor before it ends", next),
                         begin < next ? "tensors overlap" : "there is a hole");
    }
    next = begin + tensor.bytes.size();
  }
  if (next != data_bytes) {
    return input_error(path(), "data", fmt::format("{} bytes", data_bytes),
                       fmt::format("{} bytes, where the last tensor ends", next));
  }
  return {};
}

Status SafetensorsFile::align_tensors() {
  for (TensorView& tensor : tensors_) {
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.bytes.data());
    if (tensor.bytes.empty() || address % tensor.element_bytes == 0) continue;
    const std::size_t size = tensor.bytes.size();
    const std::size_t padded = (size + kCopyAlignment - 1) / kCopyAlignment * kCopyAlignment;
    auto* copy = static_cast<std::byte*>(std::aligned_alloc(kCopyAlignment, padded));
    if (copy == nullptr) {
      return no_space(fmt::format("{}: {}: no memory for an aligned copy of {} bytes", path(),
                                  printable(tensor.name), size));
    }
    copies_.emplace_back(copy);
    std::memcpy(copy, tensor.bytes.data(), size);
    tensor.bytes = {copy, size};
    copied_bytes_ += size;
  }
  return {};
}

}  // namespace kvtier
