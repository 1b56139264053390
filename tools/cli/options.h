#pragma once

#include "memory/status.h"
#include "tools/cli/parse.h"

#include <CLI/CLI.hpp>

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvtier {

/// Ends parsing with exit code 2 and "--name: message". For checks that need several options too.
[[noreturn]] inline void usage_error(const std::string& name, const Status& status) {
  throw CLI::ValidationError(name, status.message());
}

/// Adds an option that is parsed with `parse(std::string_view) -> Result<T>` straight into
/// `target`, whose present value is the default; `shown_default` is how the help writes it.
template <typename T, typename Parse>
CLI::Option* add_value(CLI::App& app, const std::string& name, T& target, Parse parse,
                       const std::string& help, const std::string& shown_default) {
  CLI::Option* option = app.add_option_function<std::string>(
      name,
      [name, &target, parse](const std::string& text) {
        auto value = parse(text);
        if (!value.ok()) usage_error(name, value.status());
        target = std::move(*value);
      },
      help);
  if (!shown_default.empty()) option->default_str(shown_default);
  return option->type_name("");
}

/// The same for several values: the option is repeated, or its values separated by commas outside
/// parentheses. Values given replace the default ones.
template <typename T, typename Parse>
CLI::Option* add_values(CLI::App& app, const std::string& name, std::vector<T>& target, Parse parse,
                        const std::string& help, const std::string& shown_default) {
  CLI::Option* option = app.add_option_function<std::vector<std::string>>(
      name,
      [name, &target, parse](const std::vector<std::string>& texts) {
        target.clear();
        for (const std::string& text : texts) {
          auto items = split_list(text);
          if (!items.ok()) usage_error(name, items.status());
          for (const std::string& item : *items) {
            auto value = parse(item);
            if (!value.ok()) usage_error(name, value.status());
            target.push_back(std::move(*value));
          }
        }
      },
      help);
  // One value per occurrence, so that a positional argument may follow.
  option->expected(1)->allow_extra_args(false);
  option->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  if (!shown_default.empty()) option->default_str(shown_default);
  return option->type_name("");
}

}  // namespace kvtier
