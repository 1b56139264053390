#include "tools/bench_torch_gpu.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>

namespace kvtier {
namespace {

// The query heads of a group are tried as heads with enable_gqa and as rows of one head (the same
// mathematics), with every backend; a graph of all sets keeps Python out of the figure.
constexpr const char* kScript = R"python(
import sys, statistics
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend as B
assert torch.cuda.is_available()
print(torch.__version__, flush=True)
backends = {"flash": B.FLASH_ATTENTION, "cudnn": B.CUDNN_ATTENTION,
            "efficient": B.EFFICIENT_ATTENTION, "math": B.MATH}

def measure(run, sets):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(sets):
            run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            run(i)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / sets)
    return statistics.median(times[2:])

with torch.inference_mode():
    for line in sys.stdin:
        batch, tokens, sets = map(int, line.split())
        make = lambda: torch.rand(batch, 8, tokens, 128, device="cuda").to(torch.bfloat16) * 2 - 1
        kv = [(make(), make()) for _ in range(sets)]
        q = torch.rand(batch, 32, 1, 128, device="cuda").to(torch.bfloat16)
        rows = q.view(batch, 8, 4, 128)
        best = (float("inf"), "none")
        for name, backend in backends.items():
            for way in ("gqa", "rows"):
                if name == "math" and tokens > 65536:
                    continue
                try:
                    with sdpa_kernel(backend):
                        if way == "gqa":
                            run = lambda i: F.scaled_dot_product_attention(q, *kv[i], enable_gqa=True)
                        else:
                            run = lambda i: F.scaled_dot_product_attention(rows, *kv[i])
                        best = min(best, (measure(run, sets), name + "/" + way))
                except Exception:
                    torch.cuda.synchronize()
        del kv
        torch.cuda.empty_cache()
        print(*best, flush=True)
)python";

[[noreturn]] void become_python(const std::string& python, int requests, int answers) {
  dup2(requests, STDIN_FILENO);
  dup2(answers, STDOUT_FILENO);
  // A missing module or backend is an answer, not something to print a traceback about.
  const int quiet = open("/dev/null", O_WRONLY | O_CLOEXEC);
  if (quiet >= 0) dup2(quiet, STDERR_FILENO);
  // What a bundle of ours was found by must not decide which libraries Python finds.
  unsetenv("LD_LIBRARY_PATH");
  execlp(python.c_str(), python.c_str(), "-c", kScript, static_cast<char*>(nullptr));
  _exit(127);
}

}  // namespace

std::unique_ptr<TorchGpuPeer> TorchGpuPeer::start(const std::string& python) {
  if (python.empty()) return nullptr;
  std::array<int, 2> requests;
  std::array<int, 2> answers;
  if (pipe2(requests.data(), O_CLOEXEC) != 0 || pipe2(answers.data(), O_CLOEXEC) != 0) {
    return nullptr;
  }
  // A peer that dies must show as a failed write, not end this process.
  signal(SIGPIPE, SIG_IGN);
  std::unique_ptr<TorchGpuPeer> peer(new TorchGpuPeer());
  peer->process_ = fork();
  if (peer->process_ == 0) become_python(python, requests[0], answers[1]);
  close(requests[0]);
  close(answers[1]);
  peer->requests_ = fdopen(requests[1], "w");
  peer->answers_ = fdopen(answers[0], "r");
  if (peer->process_ < 0) return nullptr;
  const std::optional<std::string> version = peer->read_line();
  if (!version) return nullptr;
  peer->version_ = *version;
  return peer;
}

TorchGpuPeer::~TorchGpuPeer() {
  if (requests_ != nullptr) fclose(requests_);
  if (answers_ != nullptr) fclose(answers_);
  if (process_ > 0) waitpid(process_, nullptr, 0);
}

std::optional<std::string> TorchGpuPeer::read_line() {
  std::array<char, 256> line;
  if (fgets(line.data(), line.size(), answers_) == nullptr) return std::nullopt;
  std::string text(line.data());
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) text.pop_back();
  return text;
}

std::optional<TorchGpuAnswer> TorchGpuPeer::measure(const TorchGpuRequest& request) {
  const std::string line = fmt::format("{} {} {}\n", request.batch, request.tokens, request.sets);
  if (fputs(line.c_str(), requests_) < 0 || fflush(requests_) != 0) return std::nullopt;
  const std::optional<std::string> answer = read_line();
  if (!answer) return std::nullopt;
  const std::size_t space = answer->find(' ');
  char* end = nullptr;
  const double us = std::strtod(answer->c_str(), &end);
  if (end == answer->c_str() || space == std::string::npos) return std::nullopt;
  return TorchGpuAnswer{us, answer->substr(space + 1)};
}

}  // namespace kvtier
