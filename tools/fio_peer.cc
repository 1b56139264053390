#include "tools/fio_peer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>

extern char** environ;

namespace kvtier {
namespace {

struct Output {
  int exit_status = -1;
  std::string text;
};

/// Runs a program without a shell and collects its standard output. An exit status of 127 is a
/// program that could not be started.
Result<Output> run_program(const std::vector<std::string>& arguments, bool keep_errors) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return io_error(fmt::format("pipe: {}", strerror(errno)));
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  if (keep_errors) {
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDERR_FILENO);
  } else {
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  }
  std::vector<char*> words;
  for (const std::string& argument : arguments)
    words.push_back(const_cast<char*>(argument.c_str()));
  words.push_back(nullptr);
  pid_t child = -1;
  const int refused = ::posix_spawnp(&child, words[0], &actions, nullptr, words.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  ::close(ends[1]);
  Output output;
  if (refused != 0) {
    ::close(ends[0]);
    output.exit_status = 127;
    return output;
  }
  char buffer[4096];
  ssize_t count = 0;
  while ((count = ::read(ends[0], buffer, sizeof(buffer))) > 0 || (count < 0 && errno == EINTR)) {
    if (count > 0) output.text.append(buffer, static_cast<std::size_t>(count));
  }
  ::close(ends[0]);
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  output.exit_status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return output;
}

}  // namespace

std::vector<std::string> fio_arguments(const std::string& program, const FioJob& job) {
  std::vector<std::string> arguments = {
      program,
      "--name=kvtier",
      "--output-format=json",
      fmt::format("--filename={}", job.path),
      fmt::format("--rw={}", job.pattern),
      fmt::format("--bs={}", job.io_bytes),
      fmt::format("--offset={}", job.offset),
      fmt::format("--size={}", job.bytes),
      fmt::format("--direct={}", job.direct ? 1 : 0),
      fmt::format("--ioengine={}", job.engine),
      "--time_based",
      fmt::format("--runtime={}ms", std::lround(job.seconds * 1000.0)),
      // Otherwise fio keeps a map of what it has visited, which costs it time.
      "--norandommap",
      "--randrepeat=0",
      "--invalidate=0",
      // Neither side should spend its time on making data up.
      "--refill_buffers=0",
      "--fallocate=none",
      "--allow_file_create=0",
  };
  if (job.engine == "io_uring") {
    arguments.push_back(fmt::format("--iodepth={}", job.depth));
    if (job.fixed_buffers) {
      arguments.push_back("--fixedbufs=1");
      arguments.push_back("--registerfiles=1");
    }
  } else {
    arguments.push_back("--thread");
    arguments.push_back(fmt::format("--numjobs={}", job.depth));
    arguments.push_back("--group_reporting");
  }
  return arguments;
}

std::string fio_version(const std::string& program) {
  if (program.empty()) return {};
  const auto output = run_program({program, "--version"}, false);
  if (!output.ok() || output->exit_status != 0) return {};
  std::string version = output->text.substr(0, output->text.find('\n'));
  if (version.starts_with("fio-")) version[3] = ' ';
  return version;
}

Result<double> read_fio_result(const std::string& json, bool write) {
  // Warnings may stand before the document.
  const std::size_t begin = json.find('{');
  const auto document =
      nlohmann::json::parse(begin == std::string::npos ? json : json.substr(begin), nullptr, false);
  const nlohmann::json::json_pointer place(write ? "/jobs/0/write/bw_bytes"
                                                 : "/jobs/0/read/bw_bytes");
  if (document.is_discarded() || !document.is_object() || !document.contains(place) ||
      !document[place].is_number()) {
    return corrupt(fmt::format("no bandwidth in fio's answer: {:.200}", json));
  }
  return document[place].get<double>();
}

Result<double> run_fio(const std::string& program, const FioJob& job) {
  KVTIER_ASSIGN_OR_RETURN(const Output output, run_program(fio_arguments(program, job), true));
  if (output.exit_status != 0) {
    return io_error(fmt::format("fio ended with {}: {:.400}", output.exit_status, output.text));
  }
  return read_fio_result(output.text, job.pattern.find("write") != std::string::npos);
}

}  // namespace kvtier
