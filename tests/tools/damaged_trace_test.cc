// Every way in which a trace can be damaged ends in one line that says file, field, found,
// expected.

#include "tests/tools/make_trace.h"
#include "tests/tools/run_kvtier.h"
#include "tools/trace/attention_trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <sstream>

namespace kvtier {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;
using testing::HasSubstr;

constexpr const char* kLayer = "layer-001.safetensors";
constexpr const char* kTokens = "tokens.safetensors";

struct Damage {
  const char* name;
  /// Either may be empty: changes before the trace is written and sealed, and on the files after
  /// it.
  std::function<void(TraceDraft&)> draft;
  std::function<void(const fs::path&)> files;
  /// Parts of the message.
  const char* file;
  const char* field;
  const char* found;
  const char* expected;

  friend std::ostream& operator<<(std::ostream& out, const Damage& damage) {
    return out << damage.name;
  }
};

template <typename Number>
void set_number(TensorDraft& tensor, std::size_t index, Number value) {
  std::memcpy(tensor.bytes.data() + index * sizeof(Number), &value, sizeof(Number));
}

void set_f16(TensorDraft& tensor, std::size_t index, float value) {
  store_element(tensor.bytes.data(), DType::kF16, index, value);
}

// Cuts or grows a tensor with its shape's first dimension.
void set_rows(TensorDraft& tensor, std::uint64_t rows) {
  const std::size_t row_bytes = tensor.bytes.size() / tensor.shape[0];
  tensor.shape[0] = rows;
  tensor.bytes.resize(rows * row_bytes);
}

std::function<void(TraceDraft&)> manifest(const char* pointer, ordered_json value) {
  return [=](TraceDraft& draft) { draft.manifest[ordered_json::json_pointer(pointer)] = value; };
}

std::function<void(TraceDraft&)> without(const char* parent, const char* key) {
  return [=](TraceDraft& draft) { draft.manifest[ordered_json::json_pointer(parent)].erase(key); };
}

// The change sees the manifest's text after sealing.
std::function<void(const fs::path&)> manifest_text(std::function<std::string(std::string)> change) {
  return [=](const fs::path& folder) {
    std::stringstream text;
    text << std::ifstream(folder / "manifest.json").rdbuf();
    std::ofstream(folder / "manifest.json") << change(text.str());
  };
}

// The change sees the whole file; size and hash are sealed again.
std::function<void(const fs::path&)> layer_bytes(
    std::function<void(std::vector<std::byte>&)> change) {
  return [=](const fs::path& folder) {
    std::vector<std::byte> bytes = read_bytes(folder / kLayer);
    change(bytes);
    write_bytes(folder / kLayer, bytes);
    reseal_trace(folder);
  };
}

// The change sees the layer's safetensors header; its length in the file stays.
std::function<void(const fs::path&)> header_text(std::function<std::string(std::string)> change) {
  return layer_bytes([=](std::vector<std::byte>& bytes) {
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof(length));
    char* begin = reinterpret_cast<char*>(bytes.data()) + sizeof(length);
    std::string text = change(std::string(begin, length));
    text.resize(length, ' ');
    std::memcpy(begin, text.data(), length);
  });
}

std::function<void(const fs::path&)> header(std::function<void(ordered_json&)> change) {
  return header_text([=](const std::string& text) {
    ordered_json json = ordered_json::parse(text);
    change(json);
    return json.dump();
  });
}

std::function<void(TraceDraft&)> layer(const char* tensor,
                                       std::function<void(TensorDraft&)> change) {
  return [=](TraceDraft& draft) { change(draft.tensor(kLayer, tensor)); };
}

std::function<void(TraceDraft&)> tokens(const char* tensor,
                                        std::function<void(TensorDraft&)> change) {
  return [=](TraceDraft& draft) { change(draft.tensor(kTokens, tensor)); };
}

std::function<void(TraceDraft&)> without_tensor(const char* file, const char* tensor) {
  return [=](TraceDraft& draft) {
    std::erase_if(draft.files.at(file),
                  [&](const TensorDraft& candidate) { return candidate.name == tensor; });
  };
}

const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInfinity = std::numeric_limits<float>::infinity();
constexpr const char* kManifest = "manifest.json";

// One damage is one entry of a table; clang-format would spread each over ten lines.
// clang-format off

// Defaults of the generator: 40 tokens, 6 steps, 4 query heads, 2 KV heads, dims 8, layers 1 and 3.
std::vector<Damage> manifest_damages() {
  return {
      {"NoManifest", {}, [](const fs::path& f) { fs::remove(f / kManifest); }, kManifest, "file",
       "No such file", "a regular file"},
      {"ManifestNotJson", {}, manifest_text([](const std::string&) { return "{\"schema\": tr"; }),
       kManifest, "document", "a syntax error at byte", "a JSON document"},
      {"ManifestEmpty", {}, manifest_text([](const std::string&) { return ""; }), kManifest,
       "document", "a syntax error", "a JSON document"},
      {"ManifestNoObject", {}, manifest_text([](const std::string&) { return "[1]"; }), kManifest,
       "document", "[1]", "an object"},
      {"ManifestTooDeep", {}, manifest_text([](const std::string&) {
         return "{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}";
       }), kManifest, "document", "nesting deeper than 32", "a JSON document"},
      {"KeyTwice", {},
       manifest_text([](const std::string& text) { return "{\"steps\": 1," + text.substr(1); }),
       kManifest, "steps", "the key twice", "once"},
      {"UnknownSchema", manifest("/schema", "other.trace"), {}, kManifest, "schema",
       "\"other.trace\"", "\"kvtier.attention-trace\""},
      {"UnknownVersion", manifest("/version", 2), {}, kManifest, "version", "found 2",
       "expected 1"},
      {"NoVersion", without("", "version"), {}, kManifest, "version", "nothing", "the field"},
      {"NoTokens", without("", "tokens"), {}, kManifest, "tokens", "nothing", "the field"},
      {"TokensOfWrongType", manifest("/tokens", "40"), {}, kManifest, "tokens", "\"40\"",
       "a whole number"},
      {"TokensNegative", manifest("/tokens", -1), {}, kManifest, "tokens", "-1", "a whole number"},
      {"EmptyTrace", manifest("/tokens", 0), {}, kManifest, "tokens", "found 0",
       "a whole number from 1"},
      {"NoSteps", manifest("/steps", 0), {}, kManifest, "steps", "found 0", "from 1 to 6"},
      {"StepsBeyondTokens", manifest("/steps", 41), {}, kManifest, "steps", "found 41",
       "from 1 to 6"},
      {"ContextBeyondTokens", manifest("/context_tokens", 40), {}, kManifest, "context_tokens",
       "found 40", "from 0 to 39"},
      {"NoLayers", manifest("/kept_layers", ordered_json::array()), {}, kManifest, "kept_layers",
       "[]", "at least one layer"},
      {"LayerBeyondModel", manifest("/kept_layers", {1, 4}), {}, kManifest, "kept_layers[1]",
       "found 4", "from 0 to 3"},
      {"LayersNotAscending", manifest("/kept_layers", {3, 1}), {}, kManifest, "kept_layers[1]",
       "found 1", "more than 3"},
      {"HeadsNotAMultiple", manifest("/model/query_heads", 5), {}, kManifest, "model.query_heads",
       "found 5", "a multiple of kv_heads, 2"},
      {"NoHeads", manifest("/model/kv_heads", 0), {}, kManifest, "model.kv_heads", "found 0",
       "from 1"},
      {"UnknownDtype", manifest("/dtype", "int4"), {}, kManifest, "dtype", "\"int4\"",
       "one of float16, bfloat16, float32"},
      {"ScaleNotPositive", manifest("/softmax_scale", 0.0), {}, kManifest, "softmax_scale", "0.0",
       "a number from"},
      {"CapNegative", manifest("/logit_cap", -50), {}, kManifest, "logit_cap", "-50",
       "a number from"},
      {"ThetaNotANumber", manifest("/rope/theta", "1e4"), {}, kManifest, "rope.theta", "\"1e4\"",
       "a number"},
      {"EvidenceBeyondTokens", manifest("/turns/0/evidence", ordered_json::parse("[[38, 41]]")), {},
       kManifest, "turns[0].evidence[0][1]", "found 41", "from 39 to 40"},
      {"EvidenceEmpty", manifest("/turns/1/evidence/0", {5, 5}), {}, kManifest,
       "turns[1].evidence[0][1]", "found 5", "from 6 to 40"},
      {"TurnsOverlap", manifest("/turns/1/question_start", 35), {}, kManifest,
       "turns[1].question_start", "found 35", "from 37 to 40"},
      {"SolvedNotSaid", without("/turns/0", "solved_by_full_attention"), {}, kManifest,
       "turns[0].solved_by_full_attention", "nothing", "the field"},
      {"FileOutsideFolder", {}, manifest_text([](std::string text) {
         const std::string entry = "\"files\": {";
         return text.replace(text.find(entry), entry.size(),
                             entry + "\"../secret\": {\"sha256\": \"\", \"bytes\": 1},");
       }), kManifest, "files", "../secret", "plain file names"},
      {"LayerNotListed", manifest("/kept_layers", {1, 2, 3}), {}, kManifest,
       "files.layer-002.safetensors", "nothing", "the field"},
  };
}

std::vector<Damage> file_damages() {
  return {
      {"LayerMissing", {}, [](const fs::path& f) { fs::remove(f / kLayer); }, kLayer, "file",
       "No such file", "a regular file"},
      {"LayerIsAFolder", {}, [](const fs::path& f) {
         fs::remove(f / kLayer);
         fs::create_directory(f / kLayer);
       }, kLayer, "file", "a folder", "a regular file"},
      {"TokensMissing", {}, [](const fs::path& f) { fs::remove(f / kTokens); }, kTokens, "file",
       "No such file", "a regular file"},
      {"Truncated", {}, [](const fs::path& f) { fs::resize_file(f / kLayer, 5000); }, kLayer,
       "size", "5000 bytes", "as the manifest says"},
      {"HashMismatch", {}, [](const fs::path& f) {
         std::vector<std::byte> bytes = read_bytes(f / kLayer);
         bytes.back() ^= std::byte{1};
         write_bytes(f / kLayer, bytes);
       }, kLayer, "sha256", "found ", "copy the trace again"},
      {"EmptyFile", {}, layer_bytes([](auto& bytes) { bytes.resize(1); }), kLayer, "size",
       "1 bytes", "at least 8"},
      {"HeaderLongerThanFile", {}, layer_bytes([](auto& bytes) { bytes[5] = std::byte{1}; }),
       kLayer, "header_length", "found 1099511631864", "at most"},
      {"TruncatedAndSealed", {}, layer_bytes([](auto& bytes) { bytes.resize(bytes.size() - 4); }),
       kLayer, "lse.data_offsets", "found [", "an end of at most"},
      {"TrailingBytes", {}, layer_bytes([](auto& bytes) { bytes.resize(bytes.size() + 3); }),
       kLayer, "data", "bytes", "where the last tensor ends"},
      {"HeaderNotJson", {}, header_text([](const std::string&) { return "keys"; }), kLayer,
       "header", "a syntax error", "a JSON document"},
      {"HeaderNoObject", {}, header_text([](const std::string&) { return "[]"; }), kLayer,
       "document", "[]", "a header that is an object"},
      {"TensorTwice", {}, header_text([](const std::string& text) {
         return "{\"keys\":{\"dtype\":\"F16\",\"shape\":[0],\"data_offsets\":[0,0]}," +
                text.substr(1);
       }), kLayer, "keys", "the key twice", "once"},
      {"OffsetsOverlap", {}, header([](ordered_json& json) {
         json["values"]["data_offsets"] = {0, 1280};
       }), kLayer, "values.data_offsets", "begin 0", "begin 1280, where the tensor before it ends"},
      {"OffsetsWithHole", {}, header([](ordered_json& json) { json.erase("values"); }), kLayer,
       "queries.data_offsets", "begin 2560", "begin 1280, where the tensor before it ends"},
      {"OffsetsOutOfRange", {}, header([](ordered_json& json) {
         json["lse"]["data_offsets"] = {1u << 30, (1u << 30) + 96};
       }), kLayer, "lse.data_offsets", "[1073741824,1073741920]", "an end of at most"},
      {"OffsetsReversed", {}, header([](ordered_json& json) {
         json["lse"]["data_offsets"] = {96, 0};
       }), kLayer, "lse.data_offsets", "[96,0]", "begin <= end"},
      {"OffsetsNegative", {}, header([](ordered_json& json) {
         json["keys"]["data_offsets"] = {-1, 1279};
       }), kLayer, "keys.data_offsets[0]", "-1", "a whole number"},
      {"SizeNotShape", {}, header([](ordered_json& json) {
         json["keys"]["shape"] = {41, 2, 8};
       }), kLayer, "keys.data_offsets", "[0,1280]", "1312 bytes for F16 [41, 2, 8]"},
      {"ShapeOverflows", {}, header([](ordered_json& json) {
         json["keys"]["shape"] = {1ull << 32, 1ull << 31, 8};
       }), kLayer, "keys.shape", "[4294967296,2147483648,8]", "fits 64 bits"},
      {"UnknownElementType", {}, header([](ordered_json& json) { json["keys"]["dtype"] = "Q4_K"; }),
       kLayer, "keys.dtype", "\"Q4_K\"", "one of BOOL"},
      {"NoOffsets", {}, header([](ordered_json& json) { json["keys"].erase("data_offsets"); }),
       kLayer, "keys.data_offsets", "nothing", "the field"},
      {"OtherLayersFile", {}, [](const fs::path& f) {
         fs::copy_file(f / kTokens, f / kLayer, fs::copy_options::overwrite_existing);
         reseal_trace(f);
       }, kLayer, "keys", "nothing", "a tensor of this name"},
      {"MetadataOfOtherLayer", {}, header([](ordered_json& json) {
         json["__metadata__"] = {{"layer", "3"}};
       }), kLayer, "__metadata__.layer", "found 3", "expected 1"},
  };
}

std::vector<Damage> tensor_damages() {
  return {
      {"WrongDtype", layer("keys", [](TensorDraft& t) { t.dtype = "BF16"; }), {}, kLayer,
       "keys.dtype", "found BF16", "expected F16"},
      {"DtypeOfManifest", manifest("/dtype", "bfloat16"), {}, kLayer, "keys.dtype", "found F16",
       "expected BF16"},
      {"WrongShape", layer("values", [](TensorDraft& t) { t.shape = {40, 8, 2}; }), {}, kLayer,
       "values.shape", "[40, 8, 2]", "[40, 2, 8]"},
      {"HeadDimOfManifest", manifest("/model/head_dim", 16), {}, kLayer, "keys.shape", "[40, 2, 8]",
       "[40, 2, 16]"},
      {"MoreTokensThanRows", manifest("/tokens", 41), {}, kLayer, "keys.shape", "[40, 2, 8]",
       "[41, 2, 8]"},
      {"FewerQueriesThanSteps", layer("queries", [](TensorDraft& t) { set_rows(t, 5); }), {},
       kLayer, "queries.shape", "[5, 4, 8]", "[6, 4, 8]"},
      {"NoValues", without_tensor(kLayer, "values"), {}, kLayer, "values", "nothing",
       "a tensor of this name"},
      {"NanKey", layer("keys", [](TensorDraft& t) { set_f16(t, 21 * 16 + 8 + 3, kNan); }), {},
       kLayer, "keys[21, 1, 3]", "NaN", "finite numbers"},
      {"InfiniteKey", layer("keys", [](TensorDraft& t) { set_f16(t, 0, -kInfinity); }), {}, kLayer,
       "keys[0, 0, 0]", "infinity", "finite numbers"},
      {"NanValue", layer("values", [](TensorDraft& t) { set_f16(t, 639, kNan); }), {}, kLayer,
       "values[39, 1, 7]", "NaN", "finite numbers"},
      {"InfiniteQuery", layer("queries", [](TensorDraft& t) { set_f16(t, 8, kInfinity); }), {},
       kLayer, "queries[0, 1, 0]", "infinity", "finite numbers"},
      {"NanPromptQuery", layer("prompt_queries", [](TensorDraft& t) { set_f16(t, 1, kNan); }), {},
       kLayer, "prompt_queries[0, 0, 1]", "NaN", "finite numbers"},
      {"NanOut", layer("out", [](TensorDraft& t) { set_number(t, 32, kNan); }), {}, kLayer,
       "out[1, 0, 0]", "NaN", "finite numbers"},
      {"InfiniteLse", layer("lse", [](TensorDraft& t) { set_number(t, 5, kInfinity); }), {}, kLayer,
       "lse[1, 1]", "infinity", "finite numbers"},
      {"WrongOutShape", layer("out", [](TensorDraft& t) { set_rows(t, 5); }), {}, kLayer,
       "out.shape", "[5, 4, 8]", "[6, 4, 8]"},
      {"PositionsNotIncreasing",
       layer("query_positions", [](TensorDraft& t) { set_number(t, 2, std::int64_t{35}); }), {},
       kLayer, "query_positions[2]", "found 35", "more than 35"},
      {"PositionBeyondTokens",
       layer("query_positions", [](TensorDraft& t) { set_number(t, 5, std::int64_t{40}); }), {},
       kLayer, "query_positions[5]", "found 40", "to 39"},
      {"PositionInContext",
       layer("query_positions", [](TensorDraft& t) { set_number(t, 0, std::int64_t{33}); }), {},
       kLayer, "query_positions[0]", "found 33", "from 34 to 39"},
      {"PositionNegative",
       layer("query_positions", [](TensorDraft& t) { set_number(t, 0, std::int64_t{-1}); }), {},
       kLayer, "query_positions[0]", "found -1", "from 34 to 39"},
      {"PositionsAreFloats", layer("query_positions", [](TensorDraft& t) { t.dtype = "F64"; }), {},
       kLayer, "query_positions.dtype", "F64", "I64 or I32"},
      {"PositionsDifferBetweenLayers",
       [](TraceDraft& draft) {
         draft.manifest["context_tokens"] = 33;
         set_number(draft.tensor("layer-003.safetensors", "query_positions"), 0, std::int64_t{33});
       }, {}, "layer-003.safetensors", "query_positions[0]", "found 33", "34, as in layer 1"},
      {"PromptPositionsMissing", without_tensor(kLayer, "prompt_query_positions"), {}, kLayer,
       "prompt_query_positions", "nothing", "a tensor of this name"},
      {"PromptPositionsTooFew",
       layer("prompt_query_positions", [](TensorDraft& t) { set_rows(t, 4); }), {}, kLayer,
       "prompt_queries.shape", "[5, 4, 8]", "[4, 4, 8]"},
      {"TooFewTokenIds", tokens("token_ids", [](TensorDraft& t) { set_rows(t, 39); }), {}, kTokens,
       "token_ids.shape", "[39]", "[40]"},
      {"TokenIdBeyondVocabulary",
       tokens("token_ids", [](TensorDraft& t) { set_number(t, 7, std::int32_t{1000}); }), {},
       kTokens, "token_ids[7]", "found 1000", "from 0 to 999"},
      {"SentenceEndsNotMonotone",
       tokens("sentence_ends", [](TensorDraft& t) { set_number(t, 1, std::int32_t{8}); }), {},
       kTokens, "sentence_ends[1]", "found 8", "more than 8"},
      {"SentenceEndBeyondTokens",
       tokens("sentence_ends", [](TensorDraft& t) { set_number(t, 4, std::int32_t{41}); }), {},
       kTokens, "sentence_ends[4]", "found 41", "to 40"},
  };
}

// clang-format on

fs::path write_damaged(const Damage& damage, const fs::path& folder) {
  TraceDraft draft = make_trace({});
  if (damage.draft) damage.draft(draft);
  write_trace(draft, folder);
  if (damage.files) damage.files(folder);
  return folder;
}

class DamagedTrace : public testing::TestWithParam<Damage> {};

TEST_P(DamagedTrace, SaysFileFieldFoundAndExpected) {
  const ScratchFolder scratch;
  const fs::path folder = write_damaged(GetParam(), scratch.path() / "trace");
  const Result<AttentionTrace> trace = AttentionTrace::open((folder / "manifest.json").string());
  ASSERT_FALSE(trace.ok());
  const std::string message = trace.status().message();
  const std::string place =
      (folder / GetParam().file).string() + ": " + GetParam().field + ": found ";
  EXPECT_THAT(message, testing::StartsWith(place));
  EXPECT_THAT(message, HasSubstr(GetParam().found));
  EXPECT_THAT(message, HasSubstr(", expected "));
  EXPECT_THAT(message, HasSubstr(GetParam().expected));
  EXPECT_THAT(message, testing::Not(HasSubstr("\n")));
}

std::string case_name(const testing::TestParamInfo<Damage>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(Manifest, DamagedTrace, testing::ValuesIn(manifest_damages()), case_name);
INSTANTIATE_TEST_SUITE_P(File, DamagedTrace, testing::ValuesIn(file_damages()), case_name);
INSTANTIATE_TEST_SUITE_P(Tensor, DamagedTrace, testing::ValuesIn(tensor_damages()), case_name);

// The program maps every such failure to exit code 3 and prints that very line.
TEST(DamagedTraceCommand, EndsInExitCode3WithOneLine) {
  std::vector<Damage> damages = file_damages();
  for (const auto& more : {manifest_damages(), tensor_damages()}) {
    for (std::size_t i = 0; i < more.size(); i += 4) damages.push_back(more[i]);
  }
  for (const Damage& damage : damages) {
    SCOPED_TRACE(damage.name);
    const ScratchFolder scratch;
    const fs::path folder = write_damaged(damage, scratch.path() / "trace");
    const Outcome outcome = run_kvtier({"inspect", (folder / "manifest.json").string()});
    EXPECT_EQ(outcome.exit_code, 3) << outcome.errors;
    EXPECT_EQ(outcome.output, "");
    EXPECT_THAT(outcome.errors, testing::StartsWith("kvtier: "));
    EXPECT_EQ(std::count(outcome.errors.begin(), outcome.errors.end(), '\n'), 1);
    EXPECT_THAT(outcome.errors, HasSubstr(damage.found));
  }
}

}  // namespace
}  // namespace kvtier
