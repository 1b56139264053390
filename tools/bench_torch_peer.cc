#include "tools/bench_torch_peer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>

namespace kvtier {
namespace {

// Keys and values are contiguous views into one float16 region, as PyTorch likes them best; every
// call reads another part. The query heads of a group are tried as heads with enable_gqa and as
// rows of one head (the same mathematics), and the faster way counts.
constexpr const char* kScript = R"python(
import sys, time
import torch
import torch.nn.functional as F
region = torch.empty(int(sys.argv[1]) // 2, dtype=torch.float16)
piece = (torch.rand(1 << 20) * 2 - 1).to(torch.float16)
for at in range(0, region.numel(), piece.numel()):
    part = region[at:at + piece.numel()]
    part.copy_(piece[:part.numel()])
print(torch.__version__, flush=True)
best = {}

def run(way, dim, group, heads, tokens, calls, first, queries, dtype):
    if way == "gqa":
        q = torch.rand(1, heads * group, queries, dim).to(dtype)
        attend = lambda k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    else:
        q = torch.rand(1, heads, group * queries, dim).to(dtype)
        attend = lambda k, v: F.scaled_dot_product_attention(q, k, v)
    size = heads * tokens * dim
    typed = region.view(dtype)
    places = typed.numel() // (2 * size)
    shape = (1, heads, tokens, dim)
    begin = time.perf_counter()
    for i in range(calls):
        at = (first + i) % places * 2 * size
        attend(typed[at:at + size].view(shape), typed[at + size:at + 2 * size].view(shape))
    return time.perf_counter() - begin

with torch.inference_mode():
    for line in sys.stdin:
        numbers = list(map(int, line.split()))
        dim, group, heads, tokens, calls, threads, repetition, queries, size = numbers
        dtype = torch.float16 if size == 2 else torch.float32
        torch.set_num_threads(threads)
        key = (dim, group, heads, tokens, threads, queries, size)
        if key not in best:
            few = max(1, calls // 4)
            best[key] = min(("gqa", "rows"), key=lambda way: min(
                run(way, dim, group, heads, tokens, few, few * i, queries, dtype)
                for i in range(2)))
        print(run(best[key], dim, group, heads, tokens, calls, repetition * calls, queries, dtype),
              flush=True)
)python";

struct Pipe {
  int read_end = -1;
  int write_end = -1;
};

std::optional<Pipe> open_pipe() {
  std::array<int, 2> ends;
  if (pipe2(ends.data(), O_CLOEXEC) != 0) return std::nullopt;
  return Pipe{ends[0], ends[1]};
}

[[noreturn]] void become_python(const std::string& python, const std::string& region, Pipe requests,
                                Pipe answers) {
  dup2(requests.read_end, STDIN_FILENO);
  dup2(answers.write_end, STDOUT_FILENO);
  // Idle OpenMP threads that spin would take the cores from the other side of the comparison.
  setenv("OMP_WAIT_POLICY", "passive", 1);
  setenv("KMP_BLOCKTIME", "0", 1);
  // A missing module is an answer, not something to print a traceback about.
  const int quiet = open("/dev/null", O_WRONLY | O_CLOEXEC);
  if (quiet >= 0) dup2(quiet, STDERR_FILENO);
  execlp(python.c_str(), python.c_str(), "-c", kScript, region.c_str(),
         static_cast<char*>(nullptr));
  _exit(127);
}

}  // namespace

std::unique_ptr<TorchPeer> TorchPeer::start(const std::string& python, std::size_t region_bytes) {
  if (python.empty()) return nullptr;
  const std::optional<Pipe> requests = open_pipe();
  const std::optional<Pipe> answers = open_pipe();
  if (!requests || !answers) return nullptr;
  // A peer that dies must show as a failed write, not end this process.
  signal(SIGPIPE, SIG_IGN);
  const std::string region = fmt::format("{}", region_bytes);
  std::unique_ptr<TorchPeer> peer(new TorchPeer());
  peer->process_ = fork();
  if (peer->process_ == 0) become_python(python, region, *requests, *answers);
  close(requests->read_end);
  close(answers->write_end);
  peer->requests_ = fdopen(requests->write_end, "w");
  peer->answers_ = fdopen(answers->read_end, "r");
  if (peer->process_ < 0) return nullptr;
  const std::optional<std::string> version = peer->read_line();
  if (!version) return nullptr;
  peer->version_ = *version;
  return peer;
}

TorchPeer::~TorchPeer() {
  if (requests_ != nullptr) fclose(requests_);
  if (answers_ != nullptr) fclose(answers_);
  if (process_ > 0) waitpid(process_, nullptr, 0);
}

std::optional<std::string> TorchPeer::read_line() {
  std::array<char, 256> line;
  if (fgets(line.data(), line.size(), answers_) == nullptr) return std::nullopt;
  std::string text(line.data());
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) text.pop_back();
  return text;
}

std::optional<double> TorchPeer::seconds(const TorchRequest& request) {
  const std::string line =
      fmt::format("{} {} {} {} {} {} {} {} {}\n", request.head_dim, request.group, request.kv_heads,
                  request.tokens, request.calls, request.threads, request.repetition,
                  request.queries, request.element_bytes);
  if (fputs(line.c_str(), requests_) < 0 || fflush(requests_) != 0) return std::nullopt;
  const std::optional<std::string> answer = read_line();
  if (!answer) return std::nullopt;
  char* end = nullptr;
  const double seconds = std::strtod(answer->c_str(), &end);
  if (end == answer->c_str()) return std::nullopt;
  return seconds;
}

}  // namespace kvtier
