"""Faults that the tests must notice: one small change of one file at a time, and the test that fails for it.

    python tests/mutants.py [words]      run the table, or the lines that contain these words; minutes for all

A fault is killed if its test fails in a copy of the tree with that one file changed. A test that cannot even start does
not count.
"""

import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

MUTANTS = [  # (file, text that occurs once in it, what replaces it, test that fails)
    # The gate
    ("hard_concrete.py", "torch.stack(terms).sum(0)", "torch.stack(terms).sum()",
     "tests/test_hard_concrete.py::test_every_function_of_gates_works_element_by_element"),
    ("hard_concrete.py", "persistent=False", "persistent=True",
     "tests/test_hard_concrete.py::test_noise_is_not_part_of_a_gates_state"),
    ("hard_concrete.py", "torch.logit(u) + log_theta", "torch.logit(u) - log_theta",
     "tests/test_hard_concrete.py::test_sample_matches_eq_7_written_out"),
    ("hard_concrete.py", "(torch.logit(u) + log_theta) / tau", "torch.logit(u) + log_theta / tau",
     "tests/test_hard_concrete.py::test_sample_matches_eq_7_written_out"),
    ("hard_concrete.py", "(torch.logit(u) + log_theta) / tau", "torch.logit(u) + log_theta",
     "tests/test_hard_concrete.py::test_sample_matches_eq_7_written_out"),
    ("hard_concrete.py", "torch.logit(u)", "torch.log(u)",
     "tests/test_hard_concrete.py::test_sample_is_symmetric_under_flipping_log_theta_and_noise"),
    ("hard_concrete.py", "/ tau) * (zeta - gamma) + gamma\n", "/ tau) * zeta + gamma\n",
     "tests/test_hard_concrete.py::test_probability_of_one_matches_the_grid"),
    ("hard_concrete.py", "return s.clamp(0, 1)", "return s",
     "tests/test_hard_concrete.py::test_clamped_samples_have_no_gradient_and_open_ones_have"),
    ("hard_concrete.py", "log_theta - tau * log((t", "log_theta + tau * log((t",
     "tests/test_hard_concrete.py::test_open_probability_matches_eq_8_on_a_stratified_grid"),
    ("hard_concrete.py", "log_theta - tau * log((t", "log_theta - log((t",
     "tests/test_hard_concrete.py::test_open_probability_matches_eq_8_on_a_stratified_grid"),
    ("hard_concrete.py", "log_theta - tau * log((t", "log_theta / tau - log((t",
     "tests/test_hard_concrete.py::test_open_probability_matches_eq_8_on_a_stratified_grid"),
    ("hard_concrete.py", "log((t - gamma) / (zeta - t))", "log((zeta - t) / (t - gamma))",
     "tests/test_hard_concrete.py::test_a_fresh_gate_is_open_with_probability_11_in_12"),
    ("hard_concrete.py", "return prob_above(log_theta, 1.0,", "return 1 - prob_above(log_theta, 0.0,",
     "tests/test_hard_concrete.py::test_probability_of_one_matches_the_grid"),
    ("hard_concrete.py", "torch.sigmoid(log_theta / tau)", "torch.sigmoid(log_theta)",
     "tests/test_hard_concrete.py::test_median_gate_is_the_middle_sample"),
    ("hard_concrete.py", "* (zeta - gamma) + gamma).clamp(0, 1)", "* zeta).clamp(0, 1)",
     "tests/test_hard_concrete.py::test_median_is_positive_exactly_where_open_is_likelier_than_closed"),
    ("hard_concrete.py", "w / 2 * prob_above", "w * prob_above",
     "tests/test_hard_concrete.py::test_mean_of_a_gate_that_is_closed_half_of_the_time"),
    ("hard_concrete.py", "leggauss(64)", "leggauss(2)",
     "tests/test_hard_concrete.py::test_mean_gate_at_tau_1_has_a_closed_form"),
    ("hard_concrete.py", "-0.1, 1.1, 1.0  #", "-0.1, 1.1, 2 / 3  #",
     "tests/test_hard_concrete.py::test_constants_are_the_papers"),
    ("hard_concrete.py", "nn.Parameter(torch.zeros(r))", "nn.Parameter(torch.ones(r))",
     "tests/test_hard_concrete.py::test_a_fresh_gate_is_open_with_probability_11_in_12"),
    ("hard_concrete.py", "torch.full((r,), 0.5)", "torch.rand(r)",
     "tests/test_hard_concrete.py::test_without_noise_train_and_eval_mode_agree"),
    ("hard_concrete.py", "if self.training and self.fixed is None", "if self.fixed is None",
     "tests/test_hard_concrete.py::test_module_samples_in_train_mode_takes_the_median_in_eval_mode_and_obeys_fixed"),
    ("hard_concrete.py", "if self.training and self.fixed is None", "if self.training",
     "tests/test_hard_concrete.py::test_module_samples_in_train_mode_takes_the_median_in_eval_mode_and_obeys_fixed"),
    ("hard_concrete.py", "sample_gate(self.log_theta, self.u)  # Eq. (7)",
     "sample_gate(self.log_theta, torch.rand_like(self.u).clamp(1e-6, 1 - 1e-6))",
     "tests/test_models.py::test_recomputation_sees_the_same_gates"),
    ("hard_concrete.py", "sample_gate(self.log_theta, self.u)  # Eq. (7)",
     "(sample_gate(self.log_theta, self.u) > 0).float()",
     "tests/test_budget.py::test_gradient_reaches_log_theta_through_the_sample_and_through_c"),
    # The layer
    ("salora.py", "return self.alpha / self.r0", "return self.alpha / self.r",
     "tests/test_salora.py::test_freeze_prune_merge_all_give_the_frozen_models_outputs"),
    ("salora.py", "return self.alpha / self.r0", "return self.alpha",
     "tests/test_salora.py::test_forward_is_eq_5_by_naive_loops"),
    ("salora.py", "/ k**0.5)", "/ r**0.5)",
     "tests/test_salora.py::test_a_fresh_layer_changes_nothing_and_a_is_drawn_so_that_aat_is_the_identity_on_average"),
    ("salora.py", "nn.Parameter(base.weight.new_zeros(d, r))", "nn.Parameter(torch.randn(d, r) / k**0.5)",
     "tests/test_salora.py::test_a_fresh_layer_changes_nothing_and_a_is_drawn_so_that_aat_is_the_identity_on_average"),
    ("salora.py", "nn.Parameter(torch.randn(r, k).to(base.weight) / k**0.5)  # drawn on the CPU: one seed, one start\n"
     "        self.B = nn.Parameter(base.weight.new_zeros(d, r))",
     "nn.Parameter(base.weight.new_zeros(r, k))\n        self.B = nn.Parameter(torch.randn(d, r) / k**0.5)",
     "tests/test_salora.py::test_a_fresh_layer_changes_nothing_and_a_is_drawn_so_that_aat_is_the_identity_on_average"),
    ("salora.py", "self.base = base.requires_grad_(False)", "self.base = base",
     "tests/test_salora.py::test_only_triplets_and_gates_have_gradients_and_the_frozen_weight_stays_bitwise"),
    ("salora.py", "(self.scale * self.gate()).to", "(self.scale * torch.ones_like(self.gate())).to",
     "tests/test_salora.py::test_closed_gates_leave_exactly_the_frozen_layer"),
    ("salora.py", "(self.scale * self.gate()).to", "self.gate().to",
     "tests/test_salora.py::test_open_gates_are_plain_lora"),
    ("salora.py", "(self.scale * self.gate()).to", "(self.scale * self.gate.settled()).to",
     "tests/test_salora.py::test_forward_is_eq_5_by_naive_loops"),
    ("salora.py", "(self.scale * self.gate()).to", "(self.scale * self.gate().detach()).to",
     "tests/test_salora.py::test_gradients_agree_with_finite_differences"),
    ("salora.py", "self.base(x) + F.linear(F.linear(x, self.A), B)", "self.gate().mean() * self.base(x)"
     " + F.linear(F.linear(x, self.A), B)",
     "tests/test_salora.py::test_forward_is_eq_5_by_naive_loops"),
    ("salora.py", "self.base(x) + F.linear(F", "self.base(x) - F.linear(F",
     "tests/test_salora.py::test_open_gates_are_plain_lora"),
    ("salora.py", "return self.base(x) + F.linear(F", "return F.linear(F",
     "tests/test_salora.py::test_closed_gates_leave_exactly_the_frozen_layer"),
    ("salora.py", "F.linear(F.linear(x, self.A), B)", "F.linear(F.linear(x, B.T), self.A.T)",
     "tests/test_salora.py::test_forward_is_eq_5_by_naive_loops"),
    ("salora.py", "self.B * self.gate.settled().to", "self.B * self.gate().to",
     "tests/test_models.py::test_pruning_and_merging_in_train_mode_ignore_the_noise"),
    ("salora.py", "self.scale * (self.B * self.gate.settled().to(self.B.dtype)) @ self.A",
     "self.scale * self.B @ self.A",
     "tests/test_salora.py::test_merged_model_equals_the_adapted_one_and_merging_twice_changes_nothing"),
    ("salora.py", 'n.endswith("." + target)', "n.endswith(target)",
     "tests/test_salora.py::test_a_target_is_a_whole_name_or_a_suffix_after_a_dot"),
    ("salora.py", "re.fullmatch(target, n)", "re.match(target, n)",
     "tests/test_salora.py::test_adapt_takes_no_name_of_a_container_as_a_pattern_for_what_it_holds"),
    ("salora.py", "if name and id(m) not in inside", "if name",
     "tests/test_salora.py::test_adapting_twice_is_refused_rather_than_nested"),
    ("salora.py", "}\n    model.requires_grad_(False)\n    return _replace", "}\n    return _replace",
     "tests/test_salora.py::test_adapt_replaces_by_suffix_and_by_pattern_and_freezes_the_rest"),
    ("salora.py", "nn.Parameter(layer.base.weight + layer.delta(), requires_grad=False)",
     "layer.base.weight.add_(layer.delta())",
     "tests/test_salora.py::test_merging_leaves_what_shares_a_weight_as_it_was"),
    ("salora.py", "new = {id(layer): layer.base for layer in salora_layers(model).values()}", "new = {}",
     "tests/test_salora.py::test_loading_an_adapter_removes_the_one_that_was_there"),
    ("salora.py", 'saved[side].to(base.weight)', 'saved[side].to(device)',
     "tests/test_salora.py::test_an_adapter_takes_the_dtype_of_the_model_that_it_is_loaded_into"),
    ("salora.py", "p.to(torch.promote_types(p.dtype, torch.float32))", "p",
     "tests/test_salora.py::test_canonical_triplets_in_half_precision"),
    ("hub/peft.py", "if len(names) > len(salora_layers(model))", "if not names",
     "tests/test_peft.py::test_a_layer_under_two_names_is_not_exported"),
    ("hub/peft.py", 'pissa|olora|loftq|corda|lora_ga', 'pissa|loftq|corda|lora_ga',
     "tests/test_peft.py::test_export_refuses_an_empty_adapter_and_import_what_it_cannot_represent"),
    ("salora.py", "in parent._modules.items()", "in list(parent.named_children())",
     "tests/test_salora.py::test_a_layer_with_two_names_is_adapted_under_both"),
    ("salora.py", "(layer.B.T @ layer.B - eye)", "(layer.B.T @ layer.B)",
     "tests/test_salora.py::test_orthogonality_is_zero_for_orthonormal_factors_and_its_gradient_is_zero_at_b_0"),
    ("salora.py", "layer.A @ layer.A.T - eye", "layer.A.T @ layer.A - torch.eye(layer.A.shape[1])",
     "tests/test_salora.py::test_orthogonality_is_eq_9_by_naive_loops"),
    ("salora.py", "(layer.A @ layer.A.T - eye).square().sum()", "(layer.A @ layer.A.T - eye).square().mean()",
     "tests/test_salora.py::test_orthogonality_is_eq_9_by_naive_loops"),
    ("salora.py", "(layer.A @ layer.A.T - eye).square().sum()", "(layer.A @ layer.A.T - eye).norm()",
     "tests/test_salora.py::test_orthogonality_is_eq_9_by_naive_loops"),
    ("salora.py", "if not layer.B.any():", "if False:",
     "tests/test_salora.py::test_canonical_triplets_of_an_untrained_layer_are_left_alone"),
    ("salora.py", "Qb @ U * S.sqrt()", "Qb @ U * S",
     "tests/test_salora.py::test_canonical_triplets_keep_the_product_and_are_a_singular_basis"),
    ("salora.py", "Rb @ Ra.T", "Rb @ Ra",
     "tests/test_salora.py::test_canonical_triplets_keep_the_product_and_are_a_singular_basis"),
    ("salora.py", "gate.settled().nonzero()", "gate().nonzero()",
     "tests/test_models.py::test_pruning_and_merging_in_train_mode_ignore_the_noise"),
    ("salora.py", "gate.settled().nonzero()", "(gate.settled() > 0.5).nonzero()",
     "tests/test_salora.py::test_pruned_layer_equals_the_masked_one"),
    ("salora.py", "nn.Parameter(layer.B[:, kept])", "nn.Parameter(layer.B[:, : len(kept)])",
     "tests/test_salora.py::test_pruned_layer_equals_the_masked_one"),
    ("salora.py", "gate.u[kept]", "gate.u[: len(kept)]",
     "tests/test_salora.py::test_triplets_that_stay_keep_their_gates_in_train_mode"),
    ("salora.py", "else gate.fixed[kept]", "else gate.fixed[: len(kept)]",
     "tests/test_salora.py::test_triplets_can_be_removed_in_any_order"),
    ("salora.py", "layer.base.weight + layer.delta()", "layer.base.weight - layer.delta()",
     "tests/test_salora.py::test_freeze_prune_merge_all_give_the_frozen_models_outputs"),
    ("salora.py", "return _replace(model, {id(layer): layer.base for layer in layers})", "return model",
     "tests/test_salora.py::test_merged_model_equals_the_adapted_one_and_merging_twice_changes_nothing"),
    ("salora.py", '"fixed": m.gate.fixed}', '"fixed": None}',
     "tests/test_salora.py::test_saved_adapters_come_back_exactly"),
    ("salora.py", '{"r0": m.r0,', '{"r0": m.r,',
     "tests/test_salora.py::test_saved_adapters_come_back_exactly"),
    # The budget
    ("budget.py", "open_.sum() * layer.triplet_size  # E", "open_.sum() * layer.r0  # E",
     "tests/test_budget.py::test_expected_density_is_eq_11_by_hand"),
    ("budget.py", "open_.sum() * layer.triplet_size  # E||G_i||_0 (d_i + k_i)\n"
     "        total += layer.r0 * layer.triplet_size",
     "open_.sum()\n        total += layer.r0",
     "tests/test_budget.py::test_expected_density_is_eq_11_by_hand"),
    ("budget.py", "open_.sum() * layer.triplet_size  # E||G_i||_0 (d_i + k_i)\n"
     "        total += layer.r0 * layer.triplet_size",
     "open_.mean()\n        total += 1",
     "tests/test_budget.py::test_expected_density_is_eq_11_by_hand"),
    ("budget.py", "total += layer.r0 *", "total += layer.r *",
     "tests/test_budget.py::test_densities_are_counted_against_the_rank_at_creation"),
    ("budget.py", "prob_open(gate.log_theta) if gate.fixed is None else", "prob_open(gate.log_theta) if True else",
     "tests/test_budget.py::test_a_free_gate_counts_by_probability_and_a_fixed_one_by_what_it_is"),
    ("budget.py", "(gate.fixed > 0).float()", "gate.fixed",
     "tests/test_models.py::test_a_kept_gate_counts_whole_however_little_it_is_worth"),
    ("budget.py", "prob_open(gate.log_theta) if gate", "prob_open(gate.log_theta.detach()) if gate",
     "tests/test_budget.py::test_gradient_reaches_log_theta_through_the_sample_and_through_c"),
    ("budget.py", "sum(int((layer.gate.settled() > 0).sum()) * layer.triplet_size for",
     "sum(int((layer.gate.settled() > 0.5).sum()) * layer.triplet_size for",
     "tests/test_models.py::test_a_kept_gate_counts_whole_however_little_it_is_worth"),
    ("budget.py", "layer.gate.u.copy_(part)", "layer.gate.u.copy_(u[: layer.r])",
     "tests/test_models.py::test_micro_batches_of_a_step_see_one_mask_and_every_step_of_the_window_its_own"),
    ("budget.py", "generator=generator, device=device).clamp(EPS, 1 - EPS)", "generator=generator, device=device)",
     "tests/test_models.py::test_noise_that_falls_on_the_edge_is_moved_inside"),
    ("budget.py", "EPS = 1e-6", "EPS = 1e-12",
     "tests/test_models.py::test_noise_that_falls_on_the_edge_is_moved_inside"),
    ("budget.py", "generator=generator, device=device)", "device=device)",
     "tests/test_budget.py::test_noise_is_one_draw_for_all_layers_and_stays_inside_the_unit_interval"),
    ("budget.py", "cost.sum() < density", "cost.sum() > density",
     "tests/test_budget.py::test_projection_puts_c_on_the_target_by_one_shift_for_all"),
    ("budget.py", "(prob_open(log_theta + middle) * cost).sum() / cost.sum()", "prob_open(log_theta + middle).mean()",
     "tests/test_budget.py::test_projection_puts_c_on_the_target_by_one_shift_for_all"),
    ("budget.py", "    project(layers, C_START)\n", "",
     "tests/test_budget.py::test_gates_start_at_odds_that_grow_with_energy_per_parameter_and_c_as_in_the_paper"),
    ("budget.py", "C_START = 11 / 12", "C_START = 1.0",
     "tests/test_budget.py::test_linear_penalty_has_two_multipliers_and_a_target_that_warms_up"),
    ("budget.py", "key=lambda t: -t[2]", "key=lambda t: t[2]",
     "tests/test_budget.py::test_budget_rule_never_overspends_wastes_no_room_and_respects_the_order"),
    ("budget.py", "key=lambda t: -t[2]", "key=lambda t: (-t[2], -t[0], -t[1])",
     "tests/test_budget.py::test_budget_rule_never_overspends_wastes_no_room_and_respects_the_order"),
    ("budget.py", "layers[i].triplet_size <= limit", "layers[i].triplet_size < limit",
     "tests/test_budget.py::test_budget_rule_at_density_one_keeps_everything_and_at_almost_zero_nothing"),
    ("budget.py", "if spent + layers[i].triplet_size <= limit", "if spent < limit",
     "tests/test_budget.py::test_budget_rule_never_overspends_wastes_no_room_and_respects_the_order"),
    ("budget.py", "masks[i][j] = True", "masks[i][j] = True\n            else:\n                break",
     "tests/test_budget.py::test_budget_rule_never_overspends_wastes_no_room_and_respects_the_order"),
    ("budget.py", "spent += layers[i].triplet_size", "spent += 1",
     "tests/test_budget.py::test_budget_rule_never_overspends_wastes_no_room_and_respects_the_order"),
    ("budget.py", "[median > 0 for median in medians]", "[median > 0.5 for median in medians]",
     "tests/test_budget.py::test_median_rule_keeps_the_gates_that_are_open_more_often_than_closed"),
    ("budget.py", 'if survivors == "one" else', 'if survivors != "one" else',
     "tests/test_budget.py::test_survivors_are_worth_one_or_their_median"),
    ("budget.py", "0 < density <= 1:", "0 <= density <= 1:",
     "tests/test_budget.py::test_impossible_densities_are_refused"),
    ("budget.py", '"window" if step < self.T_end', '"window" if step <= self.T_end',
     "tests/test_budget.py::test_phases_partition_the_steps_in_order"),
    ("budget.py", "start=0.2, end=0.5):", "start=0.2, end=0.8):",
     "tests/test_budget.py::test_schedule_is_the_papers_by_default_and_can_be_empty_or_everything"),
    ("budget.py", "maximize=True", "maximize=False",
     "tests/test_budget.py::test_literal_sgd_ascent_is_one_gradient_step"),
    ("budget.py", "self.lam.clamp_(min=0)", "pass",
     "tests/test_budget.py::test_multipliers_climb_the_penalty_and_are_never_negative"),
    ("budget.py", "        self.optimizer.zero_grad()\n", "",
     "tests/test_budget.py::test_multipliers_climb_the_penalty_and_are_never_negative"),
    ("budget.py", "return self.lam[0] * gap**2  # Eq. (12)", "return self.lam[0] * gap",
     "tests/test_budget.py::test_quadratic_penalty_is_eq_12"),
    ("budget.py", "return self.lam[0] * gap**2  # Eq. (12)", "return self.lam[0].detach() * gap**2",
     "tests/test_models.py::test_main_loop_drives_c_to_the_density_and_lambda_up"),
    ("budget.py", "1 - 2 * progress", "1 - progress",
     "tests/test_budget.py::test_linear_penalty_has_two_multipliers_and_a_target_that_warms_up"),
    # The encoder
    ("tiny_transformer.py", "self.heads, -1).transpose(1, 2) for f", "self.heads, -1) for f",
     "tests/test_tiny_transformer.py::test_encoder_equals_the_naive_one_and_padding_changes_nothing"),
    ("tiny_transformer.py", "h.transpose(1, 2).reshape", "h.reshape",
     "tests/test_tiny_transformer.py::test_encoder_equals_the_naive_one_and_padding_changes_nothing"),
    ("tiny_transformer.py", "(self.query, self.key, self.value))\n", "(self.key, self.query, self.value))\n",
     "tests/test_tiny_transformer.py::test_encoder_equals_the_naive_one_and_padding_changes_nothing"),
    ("tiny_transformer.py", "attn_mask=mask", "attn_mask=None",
     "tests/test_tiny_transformer.py::test_masked_tokens_are_not_looked_at"),
    ("tiny_transformer.py", "p = self.attention_dropout if self.training else 0.0", "p = self.attention_dropout",
     "tests/test_tiny_transformer.py::"
     "test_encoder_uses_the_layer_norm_eps_of_its_config_and_no_dropout_in_eval_mode"),
    ("tiny_transformer.py", "p = self.attention_dropout if self.training else 0.0", "p = 0.0",
     "tests/test_tiny_transformer.py::test_encoder_drops_out_in_train_mode"),
    ("tiny_transformer.py", "replace(config, **changes)", "config",
     "tests/test_tiny_transformer.py::test_saved_encoder_loads_exactly"),
    ("tiny_transformer.py", "nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)", "nn.LayerNorm(d), nn.LayerNorm(d)",
     "tests/test_tiny_transformer.py::"
     "test_encoder_uses_the_layer_norm_eps_of_its_config_and_no_dropout_in_eval_mode"),
    ("tiny_transformer.py", "x = self.norm1(x + self.dropout(self.attention(x, mask)))",
     "x = x + self.dropout(self.attention(self.norm1(x), mask))",
     "tests/test_tiny_transformer.py::test_encoder_equals_the_naive_one_and_padding_changes_nothing"),
    ("tiny_transformer.py", "F.gelu(self.up(x))", 'F.gelu(self.up(x), approximate="tanh")',
     "tests/test_tiny_transformer.py::test_encoder_equals_the_naive_one_and_padding_changes_nothing"),
    ("tiny_transformer.py", "real.cumsum(1) * real + self.config.pad_token_id",
     "(real.cumsum(1) - 1) * real + self.config.pad_token_id",
     "tests/test_tiny_transformer.py::test_positions_start_at_pad_plus_one_and_padding_keeps_the_padding_position"),
    ("tiny_transformer.py", "real.cumsum(1) * real +", "real.cumsum(1) +",
     "tests/test_tiny_transformer.py::test_positions_start_at_pad_plus_one_and_padding_keeps_the_padding_position"),
    ("tiny_transformer.py", " + self.token_type(token_type_ids)", "",
     "tests/test_tiny_transformer.py::test_encoder_equals_the_naive_one_and_padding_changes_nothing"),
    ("tiny_transformer.py", "x = self.dropout(self.norm(x))", "x = self.dropout(x)",
     "tests/test_tiny_transformer.py::test_encoder_equals_the_naive_one_and_padding_changes_nothing"),
    ("tiny_transformer.py", "attention_mask = real\n", "attention_mask = torch.ones_like(real)\n",
     "tests/test_tiny_transformer.py::test_encoder_equals_the_naive_one_and_padding_changes_nothing"),
    ("tiny_transformer.py", "use_reentrant=False)", "use_reentrant=False, preserve_rng_state=False)",
     "tests/test_tiny_transformer.py::test_recomputing_activations_changes_no_gradient"),
    ("tiny_transformer.py", "token_type_ids)[:, 0]", "token_type_ids)[:, -1]",
     "tests/test_tiny_transformer.py::test_classifier_reads_the_first_token_through_dense_tanh_out_proj"),
    ("tiny_transformer.py", 'torch.tanh(self.classifier["dense"](self.dropout(x)))',
     'self.classifier["dense"](self.dropout(x))',
     "tests/test_tiny_transformer.py::test_classifier_reads_the_first_token_through_dense_tanh_out_proj"),
    ("tiny_transformer.py", "self.encoder.word.weight, self.lm_head.bias)", "self.encoder.word.weight)",
     "tests/test_tiny_transformer.py::test_masked_lm_head_is_dense_gelu_norm_and_the_tied_embedding"),
    ("tiny_transformer.py", "nn.init.zeros_(module.weight.data[module.padding_idx])", "pass",
     "tests/test_tiny_transformer.py::"
     "test_encoder_starts_with_the_deviation_of_its_config_zero_biases_and_zero_padding_rows"),
    ("tiny_transformer.py", '"key": "attention.self.key"', '"key": "attention.self.value"',
     "tests/test_tiny_transformer.py::test_every_parameter_has_its_own_published_name"),
    ("tiny_transformer.py", "(0, 0, pad + 1, 0)", "(0, 0, 0, pad + 1)",
     "tests/test_tiny_transformer.py::test_bert_positions_lose_their_unused_rows_in_a_file_and_get_them_back"),
    ("tiny_transformer.py", "self.max_position_embeddings - self.pad_token_id - 1", "self.max_position_embeddings",
     "tests/test_tiny_transformer.py::test_positions_start_at_pad_plus_one_and_padding_keeps_the_padding_position"),
    ("tiny_transformer.py", " or value < least", "",
     "tests/test_tiny_transformer.py::test_loading_refuses_numbers_that_are_none"),
    ("tiny_transformer.py", "(raw.get(f.name), 1) if i < 6", "(raw.get(f.name), 1) if i < 5",
     "tests/test_tiny_transformer.py::test_loading_asks_for_every_size_and_for_room_beside_padding"),
    ("tiny_transformer.py", "self.pad_token_id >= self.vocab_size or ", "",
     "tests/test_tiny_transformer.py::test_loading_asks_for_every_size_and_for_room_beside_padding"),
    ("hub/checkpoints.py", "    if not isinstance(found, dict):\n", "    if found is None:\n",
     "tests/test_tiny_transformer.py::test_loading_refuses_damaged_json_by_file"),
    # The main loop
    ("train_glue_mini.py", "args.lr * (fall * min", "args.lr * (min",
     "tests/test_models.py::test_main_loop_lowers_the_learning_rate_linearly_and_moves_a_and_b_only"),
    ("train_glue_mini.py", "if args.restart and phase", "if phase",
     "tests/test_models.py::test_main_loop_lowers_the_learning_rate_linearly_and_moves_a_and_b_only"),
    ("train_glue_mini.py", 'args.restart and phase == "frozen"', "args.restart",
     "tests/test_models.py::test_main_loop_warms_the_learning_rate_up_anew_and_restarts_it_if_asked"),
    ("train_glue_mini.py", "fall = (total - step) / (total - falls_from)", "fall = (total - step) / total",
     "tests/test_models.py::test_main_loop_warms_the_learning_rate_up_anew_and_restarts_it_if_asked"),
    ("train_glue_mini.py", "if p.requires_grad and all(p is not theta for theta in thetas)]", "if p.requires_grad]",
     "tests/test_models.py::test_main_loop_lowers_the_learning_rate_linearly_and_moves_a_and_b_only"),
    ("train_glue_mini.py", "        optimizer.zero_grad()\n", "",
     "tests/test_models.py::test_gradients_of_the_main_loop_are_those_of_alg_1"),
    ("train_glue_mini.py", "            gate_optimizer.zero_grad()\n", "",
     "tests/test_models.py::test_gradients_of_the_main_loop_are_those_of_alg_1"),
    ("train_glue_mini.py", "    model.train()\n    started", "    started",
     "tests/test_models.py::test_gradients_of_the_main_loop_are_those_of_alg_1"),
    ("train_glue_mini.py", "(len(part) / len(rows))", "(1 / args.accumulate)",
     "tests/test_models.py::test_gradients_of_the_main_loop_are_those_of_alg_1"),
    ("train_glue_mini.py", "[args.beta * orthogonality(layers)]", "[orthogonality(layers)]",
     "tests/test_models.py::test_gradients_of_the_main_loop_are_those_of_alg_1"),
    ("train_glue_mini.py", "- schedule.T_start) / schedule.window", "- schedule.T_start) / total",
     "tests/test_models.py::test_gradients_of_the_main_loop_are_those_of_alg_1"),
    ("train_glue_mini.py", "terms.append(lagrangian(expected_density(layers), progress))",
     "terms.append(lagrangian(torch.tensor(kept_density(layers)), progress))",
     "tests/test_models.py::test_gradients_of_the_main_loop_are_those_of_alg_1"),
    ("train_glue_mini.py", "inputs, labels = batch_of(part, model, args.device)",
     "inputs, labels = batch_of(part, model, args.device); resample(layers, noise)",
     "tests/test_models.py::test_micro_batches_of_a_step_see_one_mask_and_every_step_of_the_window_its_own"),
    ("train_glue_mini.py", "resample(layers, noise)  # one draw an optimiser step", "pass",
     "tests/test_models.py::test_micro_batches_of_a_step_see_one_mask_and_every_step_of_the_window_its_own"),
    ("train_glue_mini.py", "noise = torch.Generator().manual_seed(seed)", "noise = torch.Generator().manual_seed(0)",
     "tests/test_models.py::test_micro_batches_of_a_step_see_one_mask_and_every_step_of_the_window_its_own"),
    ("train_glue_mini.py", "if step == schedule.T_start and", "if step == schedule.T_start + 1 and",
     "tests/test_models.py::test_main_loop_keeps_gates_open_then_free_then_fixed_at_exactly_t_start_and_t_end"),
    ("train_glue_mini.py", "if step == schedule.T_end and layers", "if step == schedule.T_end + 1 and layers",
     "tests/test_models.py::test_main_loop_keeps_gates_open_then_free_then_fixed_at_exactly_t_start_and_t_end"),
    ("train_glue_mini.py", "C_end = expected_density(layers).item()\n"
     "            freeze_gates(layers, args.density, args.rule, args.survivors)",
     "freeze_gates(layers, args.density, args.rule, args.survivors)\n"
     "            C_end = expected_density(layers).item()",
     "tests/test_models.py::test_main_loop_keeps_gates_open_then_free_then_fixed_at_exactly_t_start_and_t_end"),
    ("train_glue_mini.py", "gate_optimizer.step()  # down", "pass  # down",
     "tests/test_models.py::test_main_loop_keeps_gates_open_then_free_then_fixed_at_exactly_t_start_and_t_end"),
    ("train_glue_mini.py", "max(0.01, 14 / max(1, schedule.window))", "0.01",
     "tests/test_models.py::test_main_loop_keeps_gates_open_then_free_then_fixed_at_exactly_t_start_and_t_end"),
    ("train_glue_mini.py", "lagrangian.ascend()", "pass",
     "tests/test_models.py::test_main_loop_drives_c_to_the_density_and_lambda_up"),
    ("train_glue_mini.py", "project(layers, lagrangian.target_at(progress))", "project(layers, args.density)",
     "tests/test_models.py::test_projection_in_the_main_loop_leads_c_down_to_the_density"),
    ("cli/workers.py", "dist.all_reduce(flat)", "pass",
     "tests/test_program.py::test_two_processes_train_like_one"),
    ("train_glue_mini.py", "v.index_select(axis, kept) if v.dim() == 2 else v", "v",
     "tests/test_program.py::test_pruning_cuts_the_moments_of_adam_with_the_parameters"),
    ("train_glue_mini.py", "(layer.A, layer.B), (0, 1))", "(layer.A, layer.B), (1, 0))",
     "tests/test_program.py::test_pruning_cuts_the_moments_of_adam_with_the_parameters"),
    ("train_glue_mini.py", "optimizer.state.pop(before, {})", "optimizer.state.get(before, {})",
     "tests/test_program.py::test_pruning_cuts_the_moments_of_adam_with_the_parameters"),
    ("train_glue_mini.py", "for t in (0, schedule.T_start, schedule.T_end)", "for t in (0, schedule.T_start)",
     "tests/test_models.py::test_main_loop_warms_the_learning_rate_up_anew_and_restarts_it_if_asked"),
    ("train_glue_mini.py", "(since + 1) / (args.warmup * total + 1)", "since / (args.warmup * total + 1)",
     "tests/test_models.py::test_main_loop_warms_the_learning_rate_up_anew_and_restarts_it_if_asked"),
    ("train_glue_mini.py", "torch.tensor(order).argsort()", "torch.tensor(order)",
     "tests/test_models.py::test_predictions_come_in_the_order_of_the_rows"),
    ("train_glue_mini.py", "    model.eval()\n", "",
     "tests/test_models.py::test_predictions_come_in_the_order_of_the_rows"),
    ("train_glue_mini.py", "F.mse_loss(outputs.view_as(labels), labels)", "F.mse_loss(outputs, labels)",
     "tests/test_models.py::test_loss_is_cross_entropy_of_classes_and_squared_error_of_scores"),
    ("train_glue_mini.py", '"ascent": lagrangian.optimizer}', "}",
     "tests/test_program.py::test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit"),
    ("train_glue_mini.py", "optimizer.state.pop(layer.A, None), optimizer.state.pop(layer.B, None)", "pass",
     "tests/test_program.py::test_moments_start_anew_with_canonical_triplets_only"),
    ("train_glue_mini.py", "torch.optim.AdamW(weights", "torch.optim.Adam(weights",
     "tests/test_program.py::test_moments_start_anew_with_canonical_triplets_only"),
    ("budget.py", "floor(density * total_parameters(layers) + 1e-6)", "density * total_parameters(layers)",
     "tests/test_budget.py::test_budget_rule_loses_no_triplet_to_rounding"),
    ("tiny_transformer.py", '"layer_norm_eps": 1e-12, ', "",
     "tests/test_tiny_transformer.py::test_what_a_config_leaves_out_is_what_published_models_mean_by_it"),
    ("train_glue_mini.py", "str(Path(folder).resolve())", "str(folder)",
     "tests/test_program.py::test_a_run_is_evaluated_from_any_folder"),
    ("train_glue_mini.py", "if begun else", "if not begun else",
     "tests/test_program.py::test_an_interruption_says_what_can_be_done"),
    ("train_glue_mini.py", "except FloatingPointError", "except ZeroDivisionError",
     "tests/test_program.py::test_a_run_that_diverges_ends_with_the_step_and_what_to_do"),
    ("train_glue_mini.py", "    out.mkdir(parents=True, exist_ok=True)\n    return model", "    return model",
     "tests/test_program.py::test_a_folder_that_cannot_be_made_is_refused_before_training"),
]  # fmt: skip


def check(file, old, new):
    """Raises ValueError for a line of the table that has lost its place."""
    found = (ROOT / file).read_text(encoding="utf-8").count(old)
    if found != 1 or old == new:
        raise ValueError(f"{file} holds {old!r} {found} times, but should once, and the fault must change it")


def run_tests(tests, root=ROOT):
    """Run tests by node id in this process, on the tree in `root`: (pytest's status, output)."""
    os.environ.pop("SALORA_IMPL", None)
    os.chdir(root)
    torch.set_num_threads(1)
    flags = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:randomly", "--hypothesis-profile=mutants"]
    with redirect_stdout(StringIO()) as said, redirect_stderr(said):
        status = pytest.main([*flags, f"--rootdir={root}", *tests])
    return int(status), said.getvalue()


def kill(mutant):
    """(killed, what pytest said) of one line of the table, tried on a copy of the tree."""
    file, old, new, test = mutant
    check(file, old, new)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "venv", "assets"))
        path = copy / file
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        status, said = run_tests([test], copy)
    return status == 1, said  # 1: tests ran, and some failed


def in_processes(function, items):
    """Yields function(item) in order, each from a process of its own, two at a time; torch is imported only once."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "hypothesis", "pytest"])
    with context.Pool(2, maxtasksperchild=1) as pool:
        results = pool.imap(function, items)
        for _ in items:
            yield results.next(timeout=300)


def line_of(mutant, killed):
    file, old, new, test = (" ".join(text.split()) for text in mutant)
    word = "killed  " if killed else "SURVIVED"
    return f"{word} {file}: {old}  ->  {new or 'nothing'}\n         by {test}"


def main(words):
    chosen = [mutant for mutant in MUTANTS if words in " ".join(mutant)]
    started, survivors = time.time(), 0
    for mutant, (killed, said) in zip(chosen, in_processes(kill, chosen)):
        print(line_of(mutant, killed) + ("" if killed else "\n" + said), flush=True)
        survivors += not killed
    print(f"{len(chosen) - survivors} of {len(chosen)} faults killed in {time.time() - started:.0f} s")
    return survivors


if __name__ == "__main__":
    sys.exit(bool(main(" ".join(sys.argv[1:]))))
