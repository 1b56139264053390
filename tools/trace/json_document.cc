#include "tools/trace/json_document.h"

#include <cmath>
#include <set>

namespace kvtier {
namespace {

using nlohmann::json;

// Deeper than any of our formats; keeps recursion over a hostile document shallow.
constexpr int kMaxDepth = 32;
constexpr std::size_t kMaxFoundCharacters = 60;

// Notices what nlohmann::json accepts silently: a repeated key and extreme nesting.
class StructureGuard {
 public:
  bool operator()(int depth, json::parse_event_t event, json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start: keys_.emplace_back(); [[fallthrough]];
      case json::parse_event_t::array_start:
        // Dropping the part keeps the document shallow for whoever walks it, its destructor
        // included.
        if (depth > kMaxDepth) too_deep_ = true;
        return depth <= kMaxDepth;
      case json::parse_event_t::key:
        // Inside a part that was dropped for its depth there is no set to add to.
        if (!too_deep_ && !keys_.back().insert(parsed.get<std::string>()).second &&
            repeated_.empty()) {
          repeated_ = parsed.get<std::string>();
        }
        break;
      case json::parse_event_t::object_end:
        if (!too_deep_) keys_.pop_back();
        break;
      default: break;
    }
    return true;
  }

  const std::string& repeated() const { return repeated_; }
  bool too_deep() const { return too_deep_; }

 private:
  std::vector<std::set<std::string>> keys_;
  std::string repeated_;
  bool too_deep_ = false;
};

std::string describe(const json& value) {
  if (value.is_object()) return value.empty() ? "an empty object" : "an object";
  if (value.is_array() && value.size() > 8) {
    return fmt::format("an array of {} elements", value.size());
  }
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace

std::string printable(std::string_view text, std::size_t limit) {
  // Dumping as JSON escapes control characters and repairs UTF-8; the quotes are ours to drop.
  std::string escaped =
      json(std::string(text)).dump(-1, ' ', false, json::error_handler_t::replace);
  escaped = escaped.substr(1, escaped.size() - 2);
  std::string plain;
  std::size_t characters = 0;
  for (std::size_t i = 0; i < escaped.size(); ++i) {
    const auto byte = static_cast<unsigned char>(escaped[i]);
    if ((byte & 0xC0u) != 0x80u && ++characters > limit) return plain + "...";
    // Undo only the escapes that keep a line readable.
    const bool escaped_mark =
        byte == '\\' && i + 1 < escaped.size() && (escaped[i + 1] == '"' || escaped[i + 1] == '\\');
    if (escaped_mark) ++i;
    if (byte == 0x7F) {
      plain += "\\u007f";
    } else if (byte == 0xC2 && i + 1 < escaped.size() &&
               static_cast<unsigned char>(escaped[i + 1]) < 0xA0) {
      plain += '?';  // C1 control characters move the cursor of some terminals.
      ++i;
    } else {
      plain += escaped[i];
    }
  }
  return plain;
}

Status input_error(std::string_view file, std::string_view field, std::string_view found,
                   std::string_view expected, std::string_view remedy) {
  std::string line = fmt::format("{}: {}: found {}, expected {}", printable(file, 4096),
                                 printable(field), printable(found), printable(expected, 400));
  if (!remedy.empty()) line += fmt::format(" ({})", printable(remedy, 400));
  return corrupt(std::move(line));
}

Result<json> parse_json(std::span<const std::byte> text, std::string_view file,
                        std::string_view field) {
  StructureGuard guard;
  json document;
  try {
    const auto* begin = reinterpret_cast<const char*>(text.data());
    document = json::parse(begin, begin + text.size(),
                           [&guard](int depth, json::parse_event_t event, json& parsed) {
                             return guard(depth, event, parsed);
                           });
  } catch (const json::parse_error& error) {
    return input_error(file, field, fmt::format("a syntax error at byte {}", error.byte),
                       "a JSON document");
  } catch (const json::exception&) {
    return input_error(file, field, "a number out of range", "a JSON document");
  }
  if (guard.too_deep()) {
    return input_error(file, field, fmt::format("nesting deeper than {}", kMaxDepth),
                       "a JSON document nested less deeply");
  }
  if (!guard.repeated().empty()) {
    return input_error(file, guard.repeated(), "the key twice", "every key once per object");
  }
  return document;
}

Result<JsonField> JsonField::member(std::string_view key) const {
  KVTIER_ASSIGN_OR_RETURN(const std::optional<JsonField> found, optional_member(key));
  if (found) return *found;
  const std::string path = path_.empty() ? std::string(key) : fmt::format("{}.{}", path_, key);
  return input_error(file_, path, value_->contains(std::string(key)) ? "null" : "nothing",
                     "the field");
}

Result<std::optional<JsonField>> JsonField::optional_member(std::string_view key) const {
  if (!value_->is_object()) return mismatch("an object");
  const auto found = value_->find(std::string(key));
  if (found == value_->end() || found->is_null()) return std::optional<JsonField>();
  std::string path = path_.empty() ? std::string(key) : fmt::format("{}.{}", path_, key);
  return std::optional<JsonField>(JsonField(*found, file_, std::move(path)));
}

Result<std::vector<JsonField>> JsonField::elements() const {
  if (!value_->is_array()) return mismatch("an array");
  std::vector<JsonField> fields;
  fields.reserve(value_->size());
  for (std::size_t i = 0; i < value_->size(); ++i) {
    fields.push_back(JsonField((*value_)[i], file_, fmt::format("{}[{}]", path_, i)));
  }
  return fields;
}

Result<std::string> JsonField::as_string() const {
  if (!value_->is_string()) return mismatch("a string");
  return value_->get<std::string>();
}

Result<bool> JsonField::as_bool() const {
  if (!value_->is_boolean()) return mismatch("true or false");
  return value_->get<bool>();
}

Result<std::uint64_t> JsonField::as_count(std::uint64_t least, std::uint64_t most) const {
  const bool counts = value_->is_number_unsigned();
  const std::uint64_t count = counts ? value_->get<std::uint64_t>() : 0;
  if (!counts || count < least || count > most) {
    return mismatch(fmt::format("a whole number from {} to {}", least, most));
  }
  return count;
}

Result<double> JsonField::as_number() const {
  if (!value_->is_number() || !std::isfinite(value_->get<double>())) return mismatch("a number");
  return value_->get<double>();
}

Status JsonField::mismatch(std::string_view expected, std::string_view remedy) const {
  const std::string field = path_.empty() ? "document" : path_;
  return input_error(file_, field, printable(describe(*value_), kMaxFoundCharacters), expected,
                     remedy);
}

}  // namespace kvtier
