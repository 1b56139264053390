#include "tests/structure/include_rules.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

namespace kvtier {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST(IncludeRules, ThisTreeKeepsThem) {
  const SourceTree tree = read_source_tree(KVTIER_SOURCE_DIR);
  // A checker that reads nothing finds nothing.
  std::set<std::string> folders;
  for (const auto& [path, text] : tree) folders.insert(path.substr(0, path.find('/')));
  EXPECT_THAT(folders, ElementsAre("kernels", "memory", "runtime", "selectors", "tests", "tools",
                                   "transfer"));
  EXPECT_THAT(broken_rules(tree), IsEmpty());
}

struct Edge {
  const char* file;
  const char* included;
};

TEST(IncludeRules, AllowedEdgesPass) {
  const Edge edges[] = {
      {"memory/region.cc", "<hwloc.h>"},
      {"memory/region.cc", "<sys/mman.h>"},
      {"memory/region.cc", "<vector>"},
      {"memory/status.h", "<fmt/format.h>"},
      {"kernels/top_k.cc", "\"memory/dtype.h\""},
      {"kernels/top_k.cc", "\"hwy/highway.h\""},
      {"kernels/top_k.cc", "<tbb/parallel_for.h>"},
      {"kernels/checksum.cc", "<xxhash.h>"},
      {"kernels/gather_blocks.cu", "<cuda_runtime.h>"},
      {"transfer/link.cc", "\"kernels/gather_blocks.h\""},
      {"transfer/link.cc", "\"kernels/checksum.h\""},
      {"transfer/uring_file.cc", "<liburing.h>"},
      {"selectors/oracle.cc", "\"kernels/top_k.h\""},
      {"runtime/runtime.cc", "\"selectors/selector.h\""},
      {"runtime/runtime.cc", "\"transfer/file.h\""},
      {"tools/cli/main.cc", "<CLI/CLI.hpp>"},
      {"tools/cli/main.cc", "\"runtime/runtime.h\""},
      {"tools/trace/manifest.cc", "<nlohmann/json.hpp>"},
      {"transfer/sha256.cc", "<openssl/evp.h>"},
      {"tools/simulate/json_records.h", "<simdjson.h>"},
      {"tools/simulate/input_stream.cc", "<zstd.h>"},
      {"tests/runtime/a_test.cc", "<nlohmann/json.hpp>"},
      {"tests/runtime/a_test.cc", "\"tests/runtime/fixture.h\""},
  };
  for (const Edge& edge : edges) {
    const SourceTree tree = {{edge.file, fmt::format("#include {}\n", edge.included)}};
    EXPECT_THAT(broken_rules(tree), IsEmpty());
  }
}

// The canaries: each must be caught, or the first test says nothing.
TEST(IncludeRules, WrongEdgesAreCaught) {
  const Edge edges[] = {
      {"memory/region.cc", "\"kernels/top_k.h\""},
      {"kernels/top_k.cc", "\"selectors/selector.h\""},
      {"kernels/top_k.cc", "\"transfer/file.h\""},
      {"transfer/link.cc", "\"selectors/selector.h\""},
      {"transfer/link.cc", "\"runtime/runtime.h\""},
      {"transfer/link.cc", "\"kernels/top_k.h\""},
      {"selectors/oracle.cc", "\"transfer/file.h\""},
      {"selectors/oracle.cc", "\"runtime/runtime.h\""},
      {"runtime/runtime.cc", "\"tools/cli/options.h\""},
      {"tools/cli/main.cc", "\"tests/runtime/fixture.h\""},
      {"memory/region.cc", "\"tests/memory/fixture.h\""},
      {"memory/region.cc", "\"status.h\""},
      {"memory/region.cc", "\"../memory/status.h\""},
      {"memory/region.cc", "\"common/base.h\""},
      {"kernels/top_k.cc", "<hwloc.h>"},
      {"kernels/top_k.cc", "<liburing.h>"},
      {"selectors/oracle.cc", "<tbb/parallel_for.h>"},
      {"selectors/oracle.cc", "<oneapi/tbb.h>"},
      {"transfer/link.cc", "<hwy/highway.h>"},
      {"transfer/link.cc", "<sanitizer/tsan_interface.h>"},
      {"transfer/link.cc", "<xxhash.h>"},
      {"transfer/link.cc", "<cuda_runtime.h>"},
      {"runtime/runtime.cc", "<liburing/io_uring.h>"},
      {"runtime/runtime.cc", "<nlohmann/json.hpp>"},
      {"runtime/runtime.cc", "<CLI/CLI.hpp>"},
      {"tools/trace/manifest.cc", "<openssl/sha.h>"},
      {"runtime/runtime.cc", "<simdjson.h>"},
      {"transfer/link.cc", "<zstd.h>"},
      {"runtime/runtime.cc", "<gtest/gtest_prod.h>"},
      {"runtime/runtime.cc", "<boost/asio.hpp>"},
  };
  for (const Edge& edge : edges) {
    const SourceTree tree = {
        {edge.file, fmt::format("// First line.\n  #  include {}  // why\n", edge.included)}};
    EXPECT_THAT(broken_rules(tree),
                ElementsAre(HasSubstr(fmt::format("{}:2: includes", edge.file))))
        << edge.included;
  }
}

TEST(IncludeRules, PublicHeadersBringNoThirdPartyAlong) {
  SourceTree tree = {
      {"transfer/ring.h", "#include <liburing.h>\n"},
      {"transfer/file.h", "#include \"transfer/ring.h\"\n"},
      {"transfer/file.cc", "#include \"transfer/file.h\"\n"},
      {"tests/transfer/file_test.cc", "#include \"transfer/file.h\"\n"},
  };
  EXPECT_THAT(broken_rules(tree), IsEmpty());
  tree["runtime/runtime.cc"] = "#include \"transfer/file.h\"\n";
  EXPECT_THAT(
      broken_rules(tree),
      ElementsAre("runtime/runtime.cc:1: includes transfer/file.h, which brings liburing.h along"));
}

TEST(IncludeRules, EnvironmentBelongsToTools) {
  const std::string text = "const char* home = std::getenv(\"HOME\");\n";
  EXPECT_THAT(broken_rules({{"tools/cli/main.cc", text}}), IsEmpty());
  EXPECT_THAT(broken_rules({{"runtime/runtime.cc", text}}),
              ElementsAre(HasSubstr("runtime/runtime.cc:1: reads the environment")));
  EXPECT_THAT(broken_rules({{"memory/a.cc", "extern char** environ;\n"}}),
              ElementsAre(HasSubstr("memory/a.cc:1: reads the environment")));
  EXPECT_THAT(broken_rules({{"runtime/runtime.cc", "// No getenv here.\n"}}), IsEmpty());
}

TEST(IncludeRules, CudaBelongsToKernels) {
  EXPECT_THAT(broken_rules({{"kernels/gather_blocks.cu", ""}}), IsEmpty());
  EXPECT_THAT(
      broken_rules({{"runtime/step.cu", ""}, {"transfer/copy.cuh", ""}}),
      ElementsAre(HasSubstr("runtime/step.cu:1: CUDA"), HasSubstr("transfer/copy.cuh:1: CUDA")));
}

}  // namespace
}  // namespace kvtier
