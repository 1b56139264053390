#include "tests/tools/run_kvtier.h"

#include "memory/check.h"
#include "tests/tools/make_trace.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <sstream>

namespace kvtier {
namespace {

std::string text_of(const std::filesystem::path& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

}  // namespace

Outcome run_kvtier(const std::vector<std::string>& arguments, const std::string& output_path) {
  // Files instead of pipes: the program cannot block on a reader that waits for the other stream.
  const ScratchFolder scratch;
  const std::string output =
      output_path.empty() ? (scratch.path() / "output").string() : output_path;
  const std::string errors = (scratch.path() / "errors").string();
  std::vector<std::string> words = {KVTIER_BINARY};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, output.c_str(), O_CREAT | O_WRONLY,
                                   0600);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, errors.c_str(), O_CREAT | O_WRONLY,
                                   0600);
  pid_t child = 0;
  const int error = posix_spawn(&child, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  KVTIER_CHECK(error == 0, "cannot run {}: error {}", words[0], error);
  int state = 0;
  KVTIER_CHECK(waitpid(child, &state, 0) == child, "lost {}", words[0]);
  return {WIFEXITED(state) ? WEXITSTATUS(state) : -1, output_path.empty() ? text_of(output) : "",
          text_of(errors)};
}

}  // namespace kvtier
