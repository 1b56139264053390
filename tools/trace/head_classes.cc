#include "tools/trace/head_classes.h"

#include "tools/trace/json_document.h"
#include "tools/trace/mapped_file.h"

#include <utility>

namespace kvtier {
namespace {

Result<std::vector<bool>> read_layer(const JsonField& layer) {
  std::vector<bool> heads;
  KVTIER_ASSIGN_OR_RETURN(const auto elements, layer.elements());
  for (const JsonField& element : elements) {
    KVTIER_ASSIGN_OR_RETURN(const bool retrieval, element.as_bool());
    heads.push_back(retrieval);
  }
  return heads;
}

}  // namespace

Result<HeadClasses> read_head_classes(const std::string& path) {
  if (path.empty()) {
    return invalid_argument("head-class: no file is named; expected head-class(file=FILE.json)");
  }
  KVTIER_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::open(path));
  KVTIER_ASSIGN_OR_RETURN(const nlohmann::json json, parse_json(file.bytes(), path, "document"));
  const JsonField document(json, path);
  KVTIER_ASSIGN_OR_RETURN(const JsonField schema, document.member("schema"));
  KVTIER_ASSIGN_OR_RETURN(const std::string name, schema.as_string());
  if (name != kHeadClassesSchema) return schema.mismatch(kHeadClassesSchema);
  KVTIER_ASSIGN_OR_RETURN(const JsonField version, document.member("version"));
  KVTIER_RETURN_IF_ERROR(version.as_count(1, 1).status());
  KVTIER_ASSIGN_OR_RETURN(const JsonField retrieval, document.member("retrieval"));
  KVTIER_ASSIGN_OR_RETURN(const auto layers, retrieval.elements());
  HeadClasses classes;
  for (const JsonField& layer : layers) {
    KVTIER_ASSIGN_OR_RETURN(std::vector<bool> heads, read_layer(layer));
    classes.retrieval.push_back(std::move(heads));
  }
  return classes;
}

SelectorResources selector_resources() { return {.head_classes = read_head_classes}; }

}  // namespace kvtier
