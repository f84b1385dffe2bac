#include "torch_dispatch/operator_rules.hpp"

#include <algorithm>
#include <array>

namespace penstock::torch_dispatch {

namespace {

template <std::size_t kCount>
bool among(std::string_view name, const std::array<std::string_view, kCount>& names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

constexpr auto kNoValues = std::to_array<std::string_view>({"empty_like",
                                                            "zeros_like",
                                                            "ones_like",
                                                            "full_like",
                                                            "rand_like",
                                                            "randn_like",
                                                            "randint_like",
                                                            "new_empty",
                                                            "new_empty_strided",
                                                            "new_zeros",
                                                            "new_ones",
                                                            "new_full",
                                                            "size",
                                                            "stride",
                                                            "sym_size",
                                                            "sym_stride",
                                                            "sym_numel",
                                                            "sym_storage_offset",
                                                            "sym_is_contiguous",
                                                            "storage_offset",
                                                            "numel",
                                                            "dim",
                                                            "is_pinned",
                                                            "is_same_size",
                                                            "is_set_to",
                                                            "is_leaf",
                                                            "output_nr",
                                                            "_version",
                                                            "record_stream",
                                                            "set_data",
                                                            "requires_grad_",
                                                            "retain_grad",
                                                            "_debug_has_internal_overlap",
                                                            "_has_compatible_shallow_copy_type",
                                                            "_has_same_storage_numel",
                                                            "_is_zerotensor",
                                                            "_assert_tensor_metadata",
                                                            "_fused_sdp_choice",
                                                            "can_cast",
                                                            "result_type",
                                                            "set_",
                                                            "detach_",
                                                            "as_strided_",
                                                            "squeeze_",
                                                            "unsqueeze_",
                                                            "t_",
                                                            "transpose_",
                                                            "swapaxes_",
                                                            "swapdims_",
                                                            "rename_"});

constexpr auto kTakeAddresses =
    std::to_array<std::string_view>({"choose_qparams_optimized",
                                     "_choose_qparams_per_tensor",
                                     "_rowwise_prune",
                                     "fbgemm_linear_int8_weight",
                                     "fbgemm_linear_int8_weight_fp32_activation",
                                     "fbgemm_linear_quantize_weight",
                                     "fbgemm_linear_fp16_weight",
                                     "fbgemm_linear_fp16_weight_fp32_activation",
                                     "fbgemm_pack_gemm_matrix_fp16",
                                     "fbgemm_pack_quantized_matrix",
                                     "_pad_packed_sequence",
                                     "_saturate_weight_to_fp16",
                                     "_sobol_engine_draw",
                                     "_sobol_engine_ff_",
                                     "_sobol_engine_initialize_state_",
                                     "_sobol_engine_scramble_",
                                     "ctc_loss",
                                     "max_pool1d",
                                     "quantized_gru_cell",
                                     "quantized_lstm_cell",
                                     "quantized_rnn_relu_cell",
                                     "quantized_rnn_tanh_cell",
                                     "tensor_split"});

constexpr auto kRunningStatistics = std::to_array<std::string_view>(
    {"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm",
     "aten::batch_norm_gather_stats", "aten::batch_norm_gather_stats_with_counts",
     "aten::batch_norm_update_stats"});

// They bring weights that are too large into the range of half precision, in place.
constexpr auto kSaturate = std::to_array<std::string_view>(
    {"aten::_saturate_weight_to_fp16", "aten::fbgemm_pack_gemm_matrix_fp16",
     "quantized::linear_prepack_fp16", "quantized::linear_prepack_fp16_legacy",
     "_quantized::linear_prepack_fp16", "_quantized::linear_prepack_fp16_legacy",
     "quantized::linear_dynamic_fp16_unpacked_weight",
     "_quantized::wrapped_fbgemm_pack_gemm_matrix_fp16"});

constexpr auto kTraining =
    std::to_array<std::string_view>({"training", "train", "use_input_stats", "update"});

constexpr auto kOptimizers = std::to_array<std::string_view>(
    {"_fused_adam", "_fused_adam_", "_fused_adamw", "_fused_adamw_", "_fused_sgd", "_fused_sgd_",
     "_fused_adagrad", "_fused_adagrad_"});

}  // namespace

bool looks_at_no_values(std::string_view name) {
  return among(name, kNoValues);
}

bool composite_takes_addresses(std::string_view name) {
  return among(name, kTakeAddresses);
}

bool writes_silently(std::string_view name, std::string_view argument) {
  if (argument == "running_mean" || argument == "running_var") {
    return among(name, kRunningStatistics);
  }
  if (argument == "W" || argument == "weight" || argument == "input") {
    return among(name, kSaturate);
  }
  return name == "aten::rrelu_with_noise" && argument == "noise";  // torch 2.6 and before
}

bool says_training(std::string_view argument) {
  return among(argument, kTraining);
}

bool runs_by_elements(std::string_view name) {
  if (name.starts_with("_foreach_")) return name != "_foreach_mm";  // may be one grouped kernel
  return name == "_amp_foreach_non_finite_check_and_unscale_" || among(name, kOptimizers);
}

bool keeps_without_key(std::string_view name) {
  if (name.starts_with('_')) name.remove_prefix(1);
  return name.starts_with("sparse_") && name.find("_tensor") != std::string_view::npos;
}

bool takes_storage(std::string_view name) {
  return name == "set_";
}

bool joins_a_list(std::string_view name) {
  return name == "cat" || name == "stack";
}

}  // namespace penstock::torch_dispatch
