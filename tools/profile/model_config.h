#pragma once

#include "memory/status.h"
#include "tools/profile/model_description.h"

#include <span>
#include <string>

namespace kvtier {

/// Reads the `config.json` of a Hugging Face checkpoint.
///
/// Known families (`model_type`): `known_model_types()` of model_families.h. A composite config is
/// read by its `text_config`. `layer_types` and the other per-layer lists are honoured; a family's
/// own pattern takes their place where they are absent, and what the model class would take for an
/// absent key is taken and named in `assumptions`. Rope is understood in both spellings
/// (`rope_theta` with `rope_scaling`; `rope_parameters`, per kind of layer too).
///
/// Fails with `corrupt` in the form of `input_error`: an unknown family says which keys describe a
/// model of a known kind and which of them are missing; a known one names the key that is missing,
/// wrong, or contradicts another.
///
/// `read_as` takes the place of the document's own `model_type`, for a model whose layers are like
/// another family's; empty for none.
Result<ModelDescription> read_model_config(const std::string& path,
                                           const std::string& read_as = "");

/// The same of a document in memory; `file` names it in errors.
Result<ModelDescription> parse_model_config(std::span<const std::byte> text,
                                            const std::string& file,
                                            const std::string& read_as = "");

}  // namespace kvtier
