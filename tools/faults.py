"""Faults that the tests must notice: one small change of one function at a time, and the test that fails for it.

    python tools/faults.py [words]      try all, or those whose lines contain these words; minutes for all

A fault is noticed if its test fails in a copy of the tree with that one function changed. A test that cannot even start
does not count. `python -m pytest -m slow` tries all of them, too, after the tests on the tree as it is.
"""

import ast
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# (file and function, or the whole file; the test that notices; pairs of a text that occurs once there and what replaces
# it). A test is called by the beginning of its name, after "test_", as far as that is unique.
TABLE = [
    ("hard_concrete.py sample_gate", "sample_matches_eq", ("torch.logit(u) + log_theta", "torch.logit(u) - log_theta"),
     ("(torch.logit(u) + log_theta) / tau", "torch.logit(u) + log_theta / tau"),
     ("(torch.logit(u) + log_theta) / tau", "torch.logit(u) + log_theta"), ("torch.logit(u)", "torch.log(u)"),
     ("/ tau) * (zeta - gamma) + gamma\n", "/ tau) * zeta + gamma\n")),
    ("hard_concrete.py sample_gate", "clamped_samples_have_no_gradient_and_open_ones_have", ("s.clamp(0, 1)", "s")),
    ("hard_concrete.py prob_above", "probabilities_median_and_mean_match_a_stratified_grid",
     ("log_theta - tau * log", "log_theta - log"), ("log_theta - tau * log((t", "log_theta + tau * log((t"),
     ("log_theta - tau * log((t", "log_theta / tau - log((t")),
    ("hard_concrete.py prob_above", "constants_are_the_papers_and_a_fresh_gate_is_open_with_probability_11_in_12",
     ("log((t - gamma) / (zeta - t))", "log((zeta - t) / (t - gamma))")),
    ("hard_concrete.py mean_gate", "mean_gate_at_tau_1_has_a_closed_form", ("leggauss(64)", "leggauss(2)")),
    ("hard_concrete.py HardConcreteGate.__init__", "a_gates_state_loads_into", ("persistent=False", "persistent=True")),
    ("hard_concrete.py HardConcreteGate.__init__", "a_free_gate_samples", ("torch.full((r,), 0.5)", "torch.rand(r)")),
    ("hard_concrete.py HardConcreteGate.state", "a_gate_is_held_then_free_then", ('return "held"', 'return "fixed"')),
    ("hard_concrete.py HardConcreteGate.forward", "pruned_and_merged_layers_equal_the", ("self.training and ", "")),
    ("hard_concrete.py HardConcreteGate.forward", "forward_is_eq_5_by_naive_loops_with_sampled_gates_in_train_and",
     ("sample_gate(self.log_theta, self.u)", "sample_gate(self.log_theta, torch.rand_like(self.u))")),
    ("hard_concrete.py HardConcreteGate.open_probability", "expected_density_and_its_gradient_are_eq_11_by_hand",
     ("prob_open(self.log_theta) if", "prob_open(self.log_theta.detach()) if")),
    ("hard_concrete.py set_data", "a_loop_by_hand_with_a_scheduler_gives", ("p.data = torch.empty(0", "torch.empty(0")),
    ("hard_concrete.py prob_one", "probabilities_median_and_mean_match_a", ("log_theta, 1.0", "log_theta, 0.999"),
     ("return prob_above(log_theta, 1.0,", "return 1 - prob_above(log_theta, 0.0,")),
    ("hard_concrete.py median_gate", "probabilities_median_and_mean_match_a_stratified_grid",
     ("log_theta / tau", "log_theta"), ("* (zeta - gamma) + gamma).clamp(0, 1)", "* zeta).clamp(0, 1)")),
    ("hard_concrete.py mean_gate", "probabilities_median_and_mean_match_a", ("w / 2", "w"), (".sum(0)", ".sum()")),
    ("hard_concrete.py", "constants_are_the_papers_and_a_fresh_gate_is_open", ("-0.1, 1.1, 1.0", "-0.1, 1.1, 2 / 3")),
    ("hard_concrete.py HardConcreteGate.fix", "a_gate_is_held_then_free_then_fixed_and_log_theta_trains_only_while_it",
     ("self.log_theta.requires_grad_(False)", "pass"), ("gates.detach()", "gates")),
    ("hard_concrete.py HardConcreteGate.open_probability", "a_gate_is_held_then_free_then_fixed_and_log_theta_trains",
     ("(self.settled() > 0).float()", "self.settled()")),
    ("hard_concrete.py HardConcreteGate.keep", "pruned_and_merged_layers_equal_the_masked_one_whatever_the_noise",
     ("self.u[kept]", "self.u[: len(kept)]"), ("else self.fixed[kept]", "else self.fixed[: len(kept)]")),
    ("hard_concrete.py HardConcreteGate._load_from_state_dict", "a_gates_state", ('("held", "fixed")', '("fixed",)'),
     ("log_theta.shape, 0.5", "log_theta.shape, 0.25")),
    ("hard_concrete.py HardConcreteGate.__init__", "constants_are_the_papers_and_a_fresh_gate_is_open_with_probability",
     ("nn.Parameter(torch.zeros(r))", "nn.Parameter(torch.ones(r))")),
    ("hard_concrete.py HardConcreteGate.forward", "a_gate_is_held_then_free_then_fixed_and_log_theta_trains_only_while",
     ('if self.training and self.state == "free"', "if self.training")),
    ("hard_concrete.py HardConcreteGate.forward", "a_free_gate", ("sample_gate(self.log_theta, self.u)  # Eq. (7)",
     "sample_gate(self.log_theta, torch.rand_like(self.u).clamp(1e-6, 1 - 1e-6))"),
     ("sample_gate(self.log_theta, self.u)  # Eq. (7)", "(sample_gate(self.log_theta, self.u) > 0).float()")),
    ("hard_concrete.py set_data", "gradients_of_the_main_loop_are_those_of_alg_1_with_one_mask_per_step",
     ("    p.data = torch.empty(0, dtype=torch.float16 if p.dtype != torch.float16 else torch.float32, "
      "device=p.device)\n",
     "")),
    ("salora.py SaLoRALinear.__init__", "a_fresh_layer_changes_nothing_and_a_is_drawn_so", ("/ k**0.5", "/ r**0.5"),
     ("nn.Parameter(torch.zeros(d, r, **kind))", "nn.Parameter(torch.randn(d, r) / k**0.5)")),
    ("salora.py SaLoRALinear.__init__", "only_triplets_and_gates_have", ("base.requires_grad_(False)", "base")),
    ("salora.py SaLoRALinear.forward", "gradients_agree_with_finite_differences",
     ("self.gate()", "self.gate().detach()")),
    ("salora.py SaLoRALinear.forward", "closed_gates_leave_exactly_the", ("self.base(x) + F", "self.base(x) - F"),
     ("(self.scale * self.gate()).to", "(self.scale * torch.ones_like(self.gate())).to"),
     ("(self.scale * self.gate()).to", "self.gate().to"),
     ("return self.base(x) + F", "return self.gate().mean() * self.base(x) + F"),
     ("return self.base(x) + F", "return F"), ("h = F.linear(kept, self.A.to(x.dtype))", "h = F.linear(x, self.B.T)")),
    ("salora.py SaLoRALinear.keep", "pruning_slices_gradients_and_every_moment_and_clip_lists_and_schedulers_go_on",
     ("None if grad is None else grad.index_select(axis, kept)", "None")),
    ("salora.py matches", "what_cannot_be_adapted_is_refused_and_nothing_is_left_half_done",
     ('n.endswith("." + target)', "n.endswith(target)"),
     ("re.fullmatch", "re.match"),
     ("except re.error", "except OSError")),
    ("salora.py adapt", "what_cannot_be_adapted_is_refused_and_nothing_is_left_half_done",
     ("check(linear, rank, alpha, dropout)", "pass"), ("    if not ranks:", "    if False:")),
    ("salora.py matches", "a_layer_with_two_names_is_adapted_under_both",
     ("if name and id(m) not in inside", "if name")),
    ("salora.py matches", "all_linear_leaves_out_heads_and_the_output_embedding",
     ("m is not output and ", ""), (' and not HEADS & set(name.split("."))', "")),
    ("salora.py adapt", "a_later_adapt_leaves_earlier_adapters_trainable_and_ranks_may_differ_by_target",
     ("        p.requires_grad_(True)\n", "        pass\n"),
     ("SaLoRALinear(linear, rank, alpha, dropout)", "SaLoRALinear(linear, r, alpha, dropout)")),
    ("salora.py SaLoRALinear.forward", "dropout_is_on_the_adapters_input_alone_and_in_train_mode_only",
     ("self.dropout, self.training", "self.dropout, True"), ("return self.base(x) + F", "return self.base(kept) + F")),
    ("salora.py disabled", "models_of_others_train_prune_merge_reload_and_open_in",
     ("layer.base.__call__", "layer.forward")),
    ("salora.py merge", "a_quantized_base_gets_float_adapters", ("if type(layer.base) is not nn.Linear:", "if False:")),
    ("salora.py SaLoRALinear", "models_of_others_train_prune_merge_reload_and_open_in_peft[t5]",
     ("    weight = property(lambda self: self.base.weight)\n", "")),
    ("salora.py SaLoRALinear.__init__", "a_quantized_base_gets_float_adapters",
     ("weight.dtype if weight.is_floating_point() else torch.float32", "weight.dtype")),
    ("salora.py SaLoRALinear.forward", "a_quantized_base_gets_float_adapters", ("self.A.to(x.dtype)", "self.A")),
    ("salora.py adapt", "adapt_replaces_by_suffix_and_by_pattern_and_freezes", ("model.requires_grad_(False)", "pass")),
    ("salora.py orthogonality", "orthogonality_is_eq_9_by", ("(layer.B.T @ layer.B - I)", "(layer.B.T @ layer.B)"),
     ("layer.A @ layer.A.T - I", "layer.A.T @ layer.A - torch.eye(layer.A.shape[1])"),
     ("(layer.A @ layer.A.T - I).square().sum()", "(layer.A @ layer.A.T - I).square().mean()"),
     ("(layer.A @ layer.A.T - I).square().sum()", "(layer.A @ layer.A.T - I).norm()")),
    ("salora.py canonicalize", "canonical_triplets_in_half_precision_and_of_an_untrained_layer",
     ("if not layer.B.any():", "if False:"), ("p.to(torch.promote_types(p.dtype, torch.float32))", "p")),
    ("salora.py canonicalize", "canonical_triplets_keep_the_product_and_are_a_singular_basis",
     ("Qb @ U * S.sqrt()", "Qb @ U * S"), ("Rb @ Ra.T", "Rb @ Ra")),
    ("salora.py merge", "weights_of_another_phase_or_run_are", ("finished_layers(model)", "salora_layers(model)")),
    ("salora.py merge", "merging_leaves_what_shares_a_weight_as_it_was",
     ("nn.Parameter((W + layer.delta()).to(W.dtype), requires_grad=False)", "W.add_(layer.delta())")),
    ("salora.py SaLoRALinear.scale", "pruned_and_merged_layers_equal_the_masked_one", ("/ self.r0", "/ self.r")),
    ("salora.py SaLoRALinear.forward", "forward_is_eq_5_by_naive_loops_with", ("self.gate()", "self.gate.settled()")),
    ("salora.py SaLoRALinear.delta", "pruned_and_merged_layers_equal_the", ("self.gate.settled()", "self.gate()"),
     ("self.scale * (self.B * self.gate.settled().to(self.B.dtype)) @ self.A", "self.scale * self.B @ self.A")),
    ("salora.py SaLoRALinear.keep", "pruned_and_merged_layers_equal_the_masked_one_whatever_the_noise",
     ("p.data.index_select(axis, kept)", "p.data.narrow(axis, 0, len(kept))")),
    ("salora.py replace_modules", "a_layer_with_two", ("parent._modules.items()", "list(parent.named_children())")),
    ("salora.py prune", "pruned_and_merged_layers_equal_the_masked_one_whatever_the_noise",
     ("settled().nonzero()", "settled().round().nonzero()"), ("gate.settled().nonzero()", "gate().nonzero()"),
     ("layer.gate.settled().nonzero()", "(layer.gate.settled() > 0.5).nonzero()")),
    ("salora.py SaLoRALinear.scale", "closed_gates_leave", ("return self.alpha / self.r0", "return self.alpha")),
    ("salora.py merge", "pruned_and_merged_layers_equal_the_masked_one_whatever_the_noise",
     ("W + layer.delta()", "W - layer.delta()")),
    ("salora.py layer_list", "gradients_of_the_main_loop_are_those_of_alg_1_with_one_mask_per_step",
     ("list(layers.values() if isinstance(layers, dict) else layers)", "list(layers)")),
    ("budget.py total_parameters", "budget_rule_never_overspends_wastes_no_room_and", ("layer.r0 *", "layer.r *")),
    ("budget.py kept_density", "survivors_are_worth_one_or_their_median_and", ("settled() > 0", "settled() > 0.5")),
    ("budget.py resample", "noise_that_falls_on_the_edge_is_moved_inside", (".clamp(EPS, 1 - EPS)", "")),
    ("budget.py resample", "noise_is_one_draw_for_all_layers_and_stays_until_it_is_drawn_anew",
     ("copy_(part)", "copy_(u[: layer.r])"), ("generator=generator, device=device)", "device=device)")),
    ("budget.py start_gates", "gates_start_at_odds_that_grow_with_energy_per_parameter_and_c_as_in_the_paper",
     ("project(layers, C_START)", "pass"), ("    project(layers, C_START)\n", "")),
    ("budget.py project", "projection_puts_c_on_the_target_by_one_shift_for_all_however_far_away_they_are",
     ("(C < density)", "(C > density)"), ("@ (cost / cost.sum())", "@ torch.full_like(cost, 1 / len(cost))")),
    ("budget.py best_within_budget", "budget_rule_loses_no_triplet_to_rounding",
     ("affordable(budget, total_parameters(layers))", "int(budget * total_parameters(layers))"),
     ("if layers[i].triplet_size <= left", "if left > 0"), ("left -= layers[i].triplet_size", "left -= 1")),
    ("budget.py check_budget", "impossible_budgets_rules_and_windows_are_refused", ("0 < budget", "0 <= budget")),
    ("budget.py GateSchedule.phase", "phases_partition_the_steps_in", ("step < self.T_end", "step <= self.T_end")),
    ("budget.py GateSchedule.target_at", "the_target_of_the_schedule_falls_from", ("1 - 2 * progress", "1 - progress"),
     ("(step + 1 - self.T_start) / self.window", "(step - self.T_start) / self.window")),
    ("budget.py Lagrangian.forward", "quadratic_penalty_is_eq_12", ("** 2", "** 4"),
     ("return self.lam[0] * (C - self.target) ** 2", "return self.lam[0] * (C - self.target)")),
    ("budget.py Lagrangian.__init__", "lambda_climbs_the_penalty_and_is_never_negative", (", maximize=True", "")),
    ("budget.py expected_density", "expected_density_and_its_gradient", ("* layer.triplet_size for", "* layer.r0 for"),
     ("open_probability().sum() * layer.triplet_size", "open_probability().sum()"),
     ("open_probability().sum() * layer.triplet_size", "open_probability().mean() * layer.triplet_size")),
    ("budget.py best_within_budget", "budget_rule_never_overspends", ("triplet_size <= left", "triplet_size < left"),
     ("-t[0])", "(-t[0], -t[1], -t[2]))"), ("key=lambda t: -t[0]", "key=lambda t: t[0]"),
     ("masks[i][j] = True", "masks[i][j] = True\n        else:\n            break")),
    ("budget.py freeze_gates", "survivors_are_worth_one_or_their_median_and", ("median > 0 for", "median > 0.5 for")),
    ("budget.py Lagrangian.ascend", "lambda_climbs_the_penalty_and_is_never_negative",
     ("self.lam.clamp_(min=0)", "pass"), ("        self.optimizer.zero_grad()\n", "")),
    ("budget.py", "noise_that_falls_on_the_edge_is_moved_inside", ("EPS = 1e-6", "EPS = 1e-12")),
    ("budget.py", "gates_start_at_odds_that_grow_with_energy_per_parameter", ("C_START = 11 / 12", "C_START = 1.0")),
    ("budget.py freeze_gates", "budget_rule_loses_no", ('if survivors == "one" else', 'if survivors != "one" else')),
    ("budget.py GateSchedule.__init__", "phases_partition_the_steps", ("start=0.2, end=0.5):", "start=0.2, end=0.8):")),
    ("budget.py Lagrangian.forward", "lambda_climbs_the_penalty_and_is_never_negative",
     ("return self.lam[0] * (C - self.target) ** 2", "return self.lam[0].detach() * (C - self.target) ** 2")),
    ("rank_allocator.py RankAllocator.__init__", "main_loop_holds_gates_then_frees_then_fixes_them_at_exactly_t_start",
     ("max(0.01, TRAVEL / max(1, self.schedule.window))", "0.01")),
    ("rank_allocator.py RankAllocator.__init__", "the_seed_of_an_allocator", ("manual_seed(seed)", "manual_seed(0)")),
    ("rank_allocator.py RankAllocator.before_step", "gradients_of_the", ("resample(self.layers, self.noise)", "pass")),
    ("rank_allocator.py RankAllocator.after_step", "main_loop_drives_c_to_the", ("self.lagrangian.ascend()", "pass")),
    ("rank_allocator.py RankAllocator.after_step", "any_recipe_on_any_shapes_has_its_phases_on_time_and_never",
     ("target_at(self.step, self.budget)", "target_at(self.step - 1, self.budget)")),
    ("rank_allocator.py RankAllocator._release", "moments_start_anew", ("self.optimizer.state.pop(p, None)", "pass")),
    ("rank_allocator.py RankAllocator.state_dict", "a_hook_forgotten_doubled_or_out_of_order_is_refused_and_what_was",
     ('self.guard.expect("before_step", "state_dict")', "pass"),
     ('        self.guard.expect("before_step", "state_dict")\n', "")),
    ("rank_allocator.py RankAllocator.load_state_dict", "a_loop_resumed_in_any_phase_goes_on_equal_to_the_bit",
     ('requires_grad_(gates == "free")', "requires_grad_(False)"), ('self.noise.set_state(state["noise"])', "pass"),
     ('self.lagrangian.optimizer.load_state_dict(state["ascent"])', "pass"),
     ('self.gate_optimizer.load_state_dict(state["gate_optimizer"])', "pass"),
     ('        self.noise.set_state(state["noise"])\n', ""),
     ('        self.gate_optimizer.load_state_dict(state["gate_optimizer"])\n', ""),
     ('        self.lagrangian.optimizer.load_state_dict(state["ascent"])\n', "")),
    ("rank_allocator.py RankAllocator.lr_factor", "main_loop_warms_the", ("(0, T_start, T_end)", "(0, T_start)"),
     ("T_end if self.recipe.restart and step >= T_end else 0", "T_end if self.recipe.restart else 0")),
    ("rank_allocator.py RankAllocator.penalty", "gradients_of_the_main_loop_are_those_of_alg_1_with_one_mask_per_step",
     ("self.recipe.beta * orthogonality", "orthogonality"),
     ("self.lagrangian(expected_density(self.layers))", "self.lagrangian(torch.tensor(kept_density(self.layers)))")),
    ("rank_allocator.py RankAllocator.after_step", "gradients_of_the", ("self.gate_optimizer.zero_grad()", "pass")),
    ("rank_allocator.py RankAllocator._enter_phase", "any_recipe_on_any_shapes_has_its_phases_on_time_and_never",
     ("self.step == self.schedule.T_end", "self.step == self.schedule.T_end + 1")),
    ("rank_allocator.py RankAllocator._prune", "pruning_slices_gradients_and_every_moment_and_clip_lists_and",
     ("value.index_select(axis, kept)", "value.narrow(axis, 0, len(kept)).clone()")),
    ("guard.py Guard.finish", "weights_of_another_phase_or_run_are_refused_and_nothing_is_saved_or",
     ("self.check_kept(self.allocator.kept_end)", "pass")),
    ("rank_allocator.py lr_factor", "main_loop_holds_gates_then_frees_then_fixes_them_at_exactly_t_start_and_t_end",
     ("return fall * min(1,", "return min(1,"), ("(since + 1) / (warmup", "since / (warmup")),
    ("rank_allocator.py RankAllocator.lr_factor", "main_loop_holds", ("if self.recipe.restart and step", "if step")),
    ("rank_allocator.py lr_factor", "main_loop_warms_the", ("max(1, total_steps - falls_from)", "total_steps")),
    ("rank_allocator.py RankAllocator.after_step", "a_loop_resumed_in_any_phase_goes_on_equal_to_the_bit",
     ("            self.gate_optimizer.zero_grad()\n", "")),
    ("rank_allocator.py RankAllocator._enter_phase", "a_loop_by_hand_with_a_scheduler_gives_any_net_its_budget",
     ("if self.step == self.schedule.T_start", "if self.step == self.schedule.T_start + 1")),
    ("rank_allocator.py RankAllocator._decide", "a_loop_by_hand_with_a_scheduler_gives_any_net_its_budget",
     ("self.C_end = expected_density(self.layers).item()\n"
      "        freeze_gates(self.layers, self.budget, self.recipe.rule, self.recipe.survivors)",
      "freeze_gates(self.layers, self.budget, self.recipe.rule, self.recipe.survivors)\n"
      "        self.C_end = expected_density(self.layers).item()"),
     ("        self.C_end = expected_density(self.layers).item()\n        freeze_gates", "        freeze_gates")),
    ("rank_allocator.py RankAllocator._prune", "a_loop_by_hand_with_a_scheduler_gives_any_net_its_budget",
     ("state[p][key] = value.index_select(axis, kept)", "state[p][key] = value"),
     ("zip((layer.A, layer.B), moments, (0, 1))", "zip((layer.A, layer.B), moments, (1, 0))")),
    ("rank_allocator.py RankAllocator.after_step", "main_loop_holds_gates_then_frees_then_fixes_them_at_exactly_t",
     ("self.gate_optimizer.step()  # down", "pass  # down")),
    ("rank_allocator.py RankAllocator.after_step", "the_expected_density_follows_its_target_down_to_the_budget",
     ("project(self.layers, self.schedule.target_at(self.step, self.budget))", "project(self.layers, self.budget)")),
    ("rank_allocator.py RankAllocator.__init__", "weights_of_another_phase_or_run_are_refused_and_nothing_is_saved_or",
     ("            layer.allocating = True\n", "            pass\n")),
    ("rank_allocator.py RankAllocator.finish", "a_loop_by_hand_with_a_scheduler_gives_any_net_its_budget",
     ("            layer.allocating = False\n", "            pass\n")),
    ("guard.py Guard.before_step", "steps_of_another_number_too_many_and_too_few_are_refused",
     ("step >= self.allocator.total_steps", "step > self.allocator.total_steps"),
     ("any(layer.r < layer.r0 for layer in layers)", "False")),
    ("guard.py Guard.after_backward", "a_step_without_gradients_or_without_noise_in_the_window_is_refused",
     ("layers and all(layer.B.grad is None for layer in layers)", "False"),
     ('if self.allocator.phase == "window":', "if True:"),
     ("if not all(layer.training for layer in layers):", "if False:")),
    ("guard.py Guard.after_backward", "gates_that_no_gradient_reaches_are_refused_and",
     ("if not self.allocator.gate_gradients:", "if False:")),
    ("rank_allocator.py RankAllocator._take", "gates_that_no_gradient_reaches_are_refused_and",
     ("        log_theta.grad = None\n", "")),
    ("rank_allocator.py RankAllocator._take", "gradients_of_the_main_loop_are_those_of_alg_1_with",
     ("self.gate_gradients.get(log_theta, 0) + log_theta.grad", "log_theta.grad")),
    ("rank_allocator.py RankAllocator.after_backward", "a_penalty_is_added_under_no_grad_too",
     ("with torch.enable_grad():", "if True:")),
    ("rank_allocator.py Recipe.__post_init__", "impossible_recipes_are_refused",
     ("not least <= value <= most", "False"), ("type(value) not in (int, float) or ", ""),
     ("is not bool", "is str")),
    ("rank_allocator.py RankAllocator.__getstate__", "an_allocator_cannot_be_copied_or_pickled",
     ("raise TypeError(", "return dict(e=")),
    ("rank_allocator.py RankAllocator._empty", "two_processes_of_every_kind_find_what_one_finds",
     ("(p.data, *self._moments(p).values())", "(p.data,)"), ("value.index_fill_(axis, closed, 0)", "pass")),
    ("rank_allocator.py RankAllocator.finish", "two_processes_of_every_kind_find_what_one_finds",
     ("        self._prune()\n", "")),
    ("rank_allocator.py reduce_gradients", "two_processes_train_like_one",
     ("if p.requires_grad]", "if p.requires_grad and p.grad is not None]")),
    ("rank_allocator.py reduce_gradients", "two_processes_of_every_kind_find_what_one_finds",
     ("        flat /= world_size()\n", "        pass\n"), ("(*held, *more)", "held")),
    ("peers/fixed_ranks.py FixedRanks.after_backward", "two_processes_train_like_one",
     ("if self.reduce and", "if False and")),
    ("guard.py Guard.before_optimizer_step", "a_step_with_a_closure_trains_as_the_plain_loop_to_the_bit",
     ("args[1] if len(args) > 1 else", "None and")),
    ("guard.py Guard.before_optimizer_step", "a_closure_does_its_own_backward_pass_and_after_backward",
     ('elif self.due != "after_backward":', "elif False:")),
    ("guard.py Guard.see_step", "gradients_that_are_gone_before_the_step",
     ("        if layers and all(", "        if False and all(")),
    ("guard.py Guard.after_backward", "a_layer_that_the_model_passes_by_is_warned_of_when_the_window_opens",
     ("self.allocator.layers[name].B.grad is None", "self.allocator.layers[name].B.grad is not None")),
    ("guard.py Guard.warnings", "short_windows_and_a_dropout_that_the_recipe_does_not_have_are_warned_of",
     ("if window < FEW_STEPS and start < end:", "if False:"), ("if rates and recipe.dropout is not None:", "if False:"),
     ("window < FEW_STEPS and start < end", "window < FEW_STEPS"), ("0.99 * TRAVEL", "TRAVEL / 9")),
    ("guard.py Guard.check_budget", "what_an_allocator_cannot_work_with", (' and room < least', " and False")),
    ("guard.py Guard.__init__", "a_second_allocator_on_one_model_is_refused", ("if layer.allocating:", "if False:")),
    ("budget.py affordable", "budget_rule_loses_no_triplet_to_rounding",
     ("floor(budget * total) + 1", "floor(budget * total)")),
    ("hub/lightning.py RankCallback.on_train_batch_start", "two_processes_of_every_kind_find_what_one_finds",
     ("if self.begun != trainer.global_step:", "if True:")),
    ("hub/lightning.py RankCallback.load_state_dict", "lightning_resumes_from_its", ("if state:", "if False:")),
    ("hub/adapters.py trained_state", "trainer_gives_a_llama_its_budget_and_resumes_from_small_checkpoints",
     (" - adapters", "")),
    ("hub/conv1d.py _replace", "models_of_others_train_prune_merge_reload_and_open_in_peft[gpt2]",
     ("module.bias = old.bias", "pass")),
    ("guard.py Guard.load_state_dict", "a_state_of_other_decisions_or_of_another_phase_is", ("saved != now", "False")),
    ("guard.py Guard.load_state_dict", "after_an_interruption_in_the_middle_of", ('self.due = "before_step"', "pass")),
    ("guard.py Guard.finish", "what_happens_to_a_model_or_an_optimizer_later_is", ("self.check_parts()", "pass")),
    ("guard.py Guard.check_parts", "what_an_allocator_cannot_work_with", ("id(layer.gate.log_theta) in held", "False"),
     ("if id(layer.A) not in held or id(layer.B) not in held:", "if id(layer.A) not in held:"),
     ("            if layer.gate.log_theta.dtype in (torch.float16, torch.bfloat16):", "            if False:")),
    ("guard.py Guard.check_parts", "two_processes_of_every_kind_find_what_one_finds",
     ("            if any(hasattr(p", "            if False and any(hasattr(p")),
    ("guard.py Guard.check_scaler", "an_enabled_grad_scaler_is_refused_before_its", (" and scaler.is_enabled()", "")),
    ("guard.py Guard.check_processes", "several_processes_must_say_how_gradients_are_reduced_and_then",
     ("[-value for value in sums]", "[value for value in sums]")),
    ("guard.py Guard.after_step", "an_optimizer_whose_state_cannot_be_sliced_is", ("self.check_moments()", "pass")),
    ("guard.py Guard.__init__", "a_hook_forgotten_doubled_or", ("register_step_pre_hook", "register_step_post_hook")),
    ("guard.py Guard.see_step", "a_hook_forgotten_doubled_or_out_of_order_is", ("if self.stepped:", "if False:")),
    ("guard.py Guard.before_optimizer_step", "an_enabled_grad_scaler_is_refused_before_its_first",
     ("self.check_scaler()", "pass")),
    ("guard.py Guard.check_gates", "any_recipe_on_any_shapes_has", ("step <= schedule.T_end", "step < schedule.T_end")),
    ("guard.py unwrapped", "pruning_slices_gradients_and_every_moment", ("optimizer = optimizer.optimizer", "break"),
     ('    while hasattr(optimizer, "optimizer"):\n        optimizer = optimizer.optimizer\n', "")),
    ("guard.py Guard.before_step", "a_hook_forgotten_doubled_or_out_of_order_is_refused_and_what_was_due_is_still",
     ('        self.due, self.stepped = "after_backward", False', '        self.due = "after_backward"')),
    ("guard.py Guard.after_step", "a_hook_forgotten", ("        if not self.stepped:\n", "        if False:\n")),
    ("guard.py Guard.finish", "a_hook_forgotten_doubled_or_out_of_order_is_refused_and_what_was_due_is_still_possible",
     ("        if step < T_end:\n", "        if False:\n")),
    ("guard.py Guard.before_step", "weights_of_another_phase_or_run_are_refused_and_nothing_is_saved_or_merged_before",
     ("            self.check_gates(step)\n        elif", "            pass\n        elif")),
    ("guard.py Guard.check_parts", "what_happens_to_a_model_or_an_optimizer_later_is_refused_at_the_next_phase",
     ("        if list(salora_layers(model).values()) != list(layers.values()):", "        if False:")),
    ("guard.py Guard.before_step", "several_processes_must_say_how", ("            self.check_processes()\n", "")),
    ("guard.py Guard.check_arguments", "what_an_allocator_cannot_work_with_is_refused_with_a_reason",
     ("if type(total_steps) is not int or total_steps < 1:", "if total_steps < 1:")),
    ("tiny_transformer.py Block.attention", "masked_tokens_are_not_looked_at", ("attn_mask=mask", "attn_mask=None")),
    ("tiny_transformer.py Block.attention", "encoder_and_decoder_equal_the_naive", ("if self.training else 0.0", ""),
     ("self.heads, -1).transpose(1, 2) for f", "self.heads, -1) for f"), ("h.transpose(1, 2).reshape", "h.reshape"),
     ("(self.query, self.key, self.value))\n", "(self.key, self.query, self.value))\n")),
    ("tiny_transformer.py TinyTransformer.forward", "positions_start_at_pad_plus_one_and_padding_keeps_the_padding",
     ("counted.cumsum(1) * counted", "(counted.cumsum(1) - 1) * counted"),
     ("counted.cumsum(1) * counted +", "counted.cumsum(1) +")),
    ("tiny_transformer.py TinyTransformer.forward", "recomputing_activations_changes_no_gradient",
     ("use_reentrant=False)", "use_reentrant=False, preserve_rng_state=False)")),
    ("tiny_transformer.py SequenceClassifier.forward", "classifier_reads_the_first_token", ("[:, 0]", "[:, -1]"),
     ('torch.tanh(self.classifier["dense"](self.dropout(x)))', 'self.classifier["dense"](self.dropout(x))')),
    ("tiny_transformer.py TinyTransformer.forward", "models_equal_transformers_in_both_directions",
     ('torch.ones_like(real) if self.config.model_type == "bert" else real', "real")),
    ("tiny_transformer.py MaskedLM.forward", "masked_lm_head_is_dense_gelu_norm_and", (", self.lm_head.bias)", ")")),
    ("tiny_transformer.py init_weights", "encoder_starts_with_the_deviation_of_its_config_zero_biases_and_zero_padding",
     ("nn.init.zeros_(module.weight.data[module.padding_idx])", "pass")),
    ("tiny_transformer.py Block.forward", "encoder_and_decoder_equal_the_naive_one_and_padding_on_either_side_changes",
     ("F.gelu(self.up(x))", 'F.gelu(self.up(x), approximate="tanh")'),
     ("x = self.norm1(x + self.dropout(self.attention(x, mask)))",
      "x = x + self.dropout(self.attention(self.norm1(x), mask))")),
    ("tiny_transformer.py Block.__init__", "encoder_and_decoder_equal_the_naive_one_and_padding_on_either_side_changes",
     ("nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)", "nn.LayerNorm(d), nn.LayerNorm(d)")),
    ("tiny_transformer.py TinyTransformer.forward", "encoder_and_decoder_equal_the_naive_one_and", (".tril()", ""),
     (" + self.token_type(token_type_ids)", ""), ("x = self.dropout(self.norm(x))", "x = self.dropout(x)"),
     ("attention_mask = real\n", "attention_mask = torch.ones_like(real)\n"),
     ("        if self.config.is_decoder:\n", "        if False:\n"),
     ("mask.new_ones(seq, seq).tril()", "mask.new_ones(seq, seq).tril(1)")),
    ("tiny_transformer.py Block.attention", "encoder_drops_out_in_train_mode",
     ("p = self.attention_dropout if self.training else 0.0", "p = 0.0")),
    ("tiny_transformer.py TransformerConfig.max_length", "positions_start_at_pad_plus_one_and_padding_keeps_the",
     ("self.max_position_embeddings - self.pad_token_id - 1", "self.max_position_embeddings")),
    ("tiny_transformer.py TransformerConfig.__post_init__", "impossible_configs_are_refused_by_field_before_they_cost",
     ("self.pad_token_id >= self.vocab_size or ", "")),
    ("cli/interrupts.py end_on_interrupt", "an_interruption_while_torch_is_imported_prints_nothing",
     ("signal.signal(signal.SIGINT, signal.SIG_DFL)", "signal.getsignal(signal.SIGINT)")),
    ("train_glue_mini.py task_loss", "loss_is_cross_entropy_of_classes_and", ("outputs.view_as(labels)", "outputs")),
    ("train_glue_mini.py fine_tune", "gradients_of_the_main_loop_are_those_of_alg_1_with_one_mask_per_step",
     ("    model.train()\n", ""), ("inputs, labels = batch_of(part, model, device)",
      'inputs, labels = batch_of(part, model, device); __import__("budget").resample(allocator.layers)'),
     ("        optimizer.zero_grad()\n", "")),
    ("train_glue_mini.py fine_tune", "a_resumed_run_equals_the_uninterrupted_one_bit_for_bit[salora-before]",
     ("range(allocator.step, allocator", "range(0, allocator")),
    ("train_glue_mini.py fine_tune", "every_epoch_of", ('seed_of(seed, "batches", epoch)', 'seed_of(seed, "batches")'),
     ('seed_of(seed, "dropout", epoch, worker())', 'seed_of(seed, "dropout")')),
    ("train_glue_mini.py fine_tune", "main_loop_warms_the_learning_rate_up", ("lr * allocator.lr_factor(step)", "lr")),
    ("train_glue_mini.py fine_tune", "accumulating_equals_the_whole", ("(len(part) / len(batch))", "(1 / accumulate)")),
    ("train_glue_mini.py run", "alora_scores_by_the_negative", ("score = lambda: -loss_of", "score = lambda: loss_of"),
     ("train, held_out = hold_out(", "_, held_out = hold_out(")),
    ("train_glue_mini.py loss_of", "alora_scores_by_the_negative_loss_of", ("model.eval()(*inputs)", "model(*inputs)")),
    ("train_glue_mini.py main", "two_processes_train_like_one_and_only_the_first_speaks",
     ("redirect_stdout(None) if worker() > 0 else", "nullcontext() if worker() > 0 else")),
    ("cli/afterwards.py predict", "predictions_come_in_the", ("torch.tensor(order).argsort()", "torch.tensor(order)")),
    ("cli/afterwards.py predict", "a_model_whose_outputs_are_not_finite",
     ("if not outputs.isfinite().all():", "if False:")),
    ("cli/afterwards.py evaluate", "mnli_is_scored_on_both_kinds_of_dev_rows", ("if path.is_file():", "if False:")),
    ("cli/afterwards.py label", "rows_with_labels_are_scored_and", ("has_labels(path, task)", "False"),
     ("path.name, predicted)", '"test.tsv", predicted)')),
    ("cli/afterwards.py export", "the_lines_that_export_prints_open_what_it_wrote_with",
     (", ignore_mismatched_sizes=True)", ")"), ("{said}, ", ", "), ("labels, safetensors=True", "safetensors=True"),
     ("labels, safetensors=True", "labels")),
    ("glue/tasks.py has_labels", "a_file_has_labels_if_its_header_says_so",
     ("bool(task.header) and len(first) == len(task.header)", "False"), ("bool(task.header) and ", ""),
     (" and len(first) == len(task.header)", ""), ("        return task.label in first", "        return True")),
    ("glue/tasks.py Task.predictions_of", "predictions_use_the_names_of_labels_and_of_what",
     ('f"{self.folder}.{Path(file).stem}.tsv"', 'f"{self.folder}.tsv"'),
     ('f"{self.folder}.{Path(file)', 'f"{self.folder}-{Path(file)')),
    ("glue/metrics.py spearman", "correlations_of_a_nan_are_nan_as_in", ("if np.isnan(values).any():", "if False:")),
    ("glue/metrics.py pearson", "correlations_of_a_nan_are_nan_as_in", ("if np.isnan(x @ y):", "if False:")),
    ("cli/afterwards.py reopen", "other_weights_in", ('frozen_digest(model) != summary.get("frozen_digest")', "False")),
    ("cli/files.py check_free", "default_folders_are_numbered_on_and_a_given", ("found and not {", "False and not {")),
    ("cli/files.py made", "a_study_that_is_interrupted_goes_on", ("path.rmdir()", "pass")),
    ("cli/files.py made", "a_place_where_nothing_can_be_written", ("except OSError as error:", "except ():")),
    ("cli/files.py locked", "a_folder_is_one_runs", ("fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass")),
    ("cli/files.py claimed", "an_interruption_says_how_to_go_on",
     ('if (folder / "checkpoint.pt").is_file():', "if True:")),
    ("cli/files.py _feed", "equal_digests_mean_equal", ('f"{value.dtype} {tuple(value.shape)}"', 'f"{value.dtype}"')),
    ("cli/flags.py positive", "bad_input_is_one_clear_line_and_leaves", ("if float(text) >= MOST:", "if False:")),
    ("cli/flags.py device_of", "under_torchrun_a_process_takes_the_cuda", ('name.startswith("cuda") and', "False and")),
    ("cli/journal.py trace_of", "a_trace_has", ("layer.gate.open_probability().sum()", "layer.gate.settled().sum()")),
    ("cli/journal.py check_finite", "weights_that_are", ("if not all(p.isfinite().all()", "if not all(True")),
    ("cli/journal.py Journal.add", "a_run_that_diverges_in_its_last_update_has_no_score",
     ("        if done == self.total_steps:\n            check", "        if False:\n            check")),
    ("cli/journal.py Journal.begin_epoch", "a_resumed_run_equals_the[lora-after]", ('"rows": self.rows', '"rows": []')),
    ("cli/journal.py Journal.restore", "settings_that_were_edited_are_not_resumed",
     ('if saved["fingerprint"].get(name) != value:', "if False:")),
    ("cli/pictures.py rank_grid", "the_table_of_ranks_has_a_line_per", ("split_name(name)[::-1]", "split_name(name)")),
    ("cli/pictures.py open_probabilities", "the_gates_that", ("for row in reversed(trace):", "for row in trace:")),
    ("cli/report.py finish_run", "every_task_runs", ('(folder / "checkpoint.pt").unlink(missing_ok=True)', "pass")),
    ("cli/report.py write_predictions", "predictions_use_the_names_of_labels_and_of", ("min(5.0, max(0.0, p))", "p")),
    ("cli/interrupts.py interruptible", "an_interruption_of_the_program_is_said",
     ("signal.signal(signal.SIGINT, signal.default_int_handler)", "pass")),
    ("cli/program.py flush", "output_that_nobody_reads_or_that_fits", ("sys.stdout.flush()", "pass")),
    ("cli/program.py errors_as_lines", "a_run_that_diverges_ends_with_the_step_and_what", ("FloatingPointError, ", "")),
    ("cli/runs.py interrupted", "damaged_and_foreign_files_are_refused_and_left_alone",
     ('saved.pop("digest", None) == digest_of(saved)', 'saved.pop("digest", None) is not None')),
    ("cli/runs.py read_run", "bad_input_is_one_clear_line_and_leaves", ("more = [k for k", "more = [] and [k for k")),
    ("cli/settings.py settle", "settings_follow_from_task_method_and", ("if getattr(args, name) is None:", "if True:")),
    ("cli/settings.py check_flags", "bad_input_is_one_clear_line_and_leaves", ("if given and not there:", "if False:")),
    ("cli/settings.py dropout_rates", "settings_follow_from_task", ('args.method not in ("full", "head")', "True")),
    ("cli/setup.py seed_of", "every_epoch_of_every_seed_has_its_own_order_and", ("getrandbits(63)", "getrandbits(1)")),
    ("cli/table.py whole_lines", "a_table_that_is_cut_off_anywhere", ('data[: data.rfind(b"\\n") + 1]', "data")),
    ("cli/table.py read_table", "a_table_that_is_damaged_in_any_other", ("if cells == header:", "if False:"),
     ("if len(cells) != len(header):", "if False:"), ("check_regular(path)", "pass"), ("            check(row)\n", "")),
    ("cli/table.py append", "of_several_rows_all_are_added_or_none", ("except BaseException as", "except Exception as"),
     ("            file.truncate(len(whole))\n            if", "            if")),
    ("cli/workers.py start_workers", "two_processes_train_like_one", ("        import torch._dynamo", "        pass")),
    ("cli/workers.py share_of", "accumulating_equals_the_whole_batch_noise_included",
     ("batch[worker() + workers() * i :: stride]", "batch[worker() :: stride]")),
    ("course/answer.py answer", "a_hostile_submission_gets[trespasses, and is right]",
     ("    restrict(_readable(), [folder, os.devnull])\n", "")),
    ("course/bare_loop.py before_step", "the_bare_loop_is_a_script_that", ("            canonicalize(layer)\n", "")),
    ("course/checking.py _near", "a_wrong_solution_fails_and_the_first[2-no clamp]", ("abs(a - b) <= within", "True")),
    ("course/ending.py ending_in_a_line", "a_table_that_was_interrupted", ("_end(130, ", "_end(1, ")),
    ("course/exercises.py chosen", "exercises_are_chosen_by_numbers", (" or not set(found) <= EXERCISES.keys()", "")),
    ("course/explore_gate.py facts_of", "the_picture_of_a_gate", ("(1 - p) * tau *", "(1 - p) *")),
    ("course/fence.py limit_computing", "a_hostile_submission_gets[loops for ever]",
     ("    resource.setrlimit(", "    str(")),
    ("course/graft.py _insert", "a_function_runs_for_all_who_call_it_and_its", ("setattr(theirs, key, value)", "pass")),
    ("course/graft.py blanked", "the_references_own_answer_is_gone", ("dict.fromkeys(names, exercise.stub)", "{}")),
    ("course/hidden.py _test", "hidden_tests_pass", ("_agree(question(*args), expected, ", "str(")),
    ("course/intake.py _student_and_file", "of_files_that_lie_side_by_side", ("(_\\d+)?_\"", "_\"")),
    ("course/intake.py source_of", "a_class_in_every_state", (" if isinstance(node, KEPT)", "")),
    ("course/intake.py printable", "a_class_in_every_state", (" or c.isprintable()", " or c.isascii()")),
    ("course/judge.py _run_tests", "a_right_solution_may_be_slow", ("            break\n", "")),
    ("course/judge.py totals", "a_class_in_every_state", ('minutes[number] * result["points"]', 'result["points"]')),
    ("course/lesson.py words", "a_student_reads_what_a", ("{happened}", "{happened!r}")),
    ("course/make_handout.py blanks", "a_handout_has_blanks_for_answers_and_what_gives_them_away_and_nothing_of_the",
     ('f"left out: it gives away exercise {exercise.number}"', "exercise.stub")),
    ("course/reading.py unusual", "the_teacher_is_told_of_odd", (" if name not in usual", "")),
    ("course/run.py written_in", "run_trains_with_functions_that_are_written", (" and not is_stub(nodes[name])", "")),
    ("course/table.py _names_in", "a_table_that_was_interrupted", ("rows[0] != head", "False"),
     ("if whole != text:", "if False:")),
    ("course/variant.py blaming", "all_texts_of_a_variant_name", ('(?=, "|', '(?=; "|')),
    ("course/variant.py with_version", "a_version_is_solved_by_its_reference_and_not[5-a]",
     ("first_line(node) : node.end_lineno", "first_line(node) : first_line(node)")),
    ("course/variant.py versions_for", "all_texts_of_a_variant_name", ("random.Random(seed)", "random.Random(0)")),
    ("course/variant.py write", "all_texts_of_a_variant_name",
     ('        change("course/hidden.py", blaming, version)\n', "")),
    ("course/variant.py in_section", "all_texts_of_a_variant_name",
     ("        section = section.replace(old, new)\n", "        section = section.replace(old, old)\n")),
    ("course/written.py beside_rubric", "a_class_in_every_state", ("answers.get(exercise.number)", "None")),
    ("experiments/arms.py Arm.allocator", "an_arm_has_the_allocator_recipe_and_budget_of", (", **self.options}", "}")),
    ("experiments/arms.py nearest", "an_arm_that_is_not_in_a_table_takes_the_nearest_of_its_family_or_of_its_kind",
     ('(arm.family, "salora-16" if arm.is_cut else "lora")', '(arm.family, "lora")')),
    ("experiments/compare.py fresh_rows", "generated_tasks_are_tuned", ("[TRAIN_ROWS + DEV_ROWS :]", "[TRAIN_ROWS:]")),
    ("experiments/cost.py Stepper.__init__", "what_is_measured_is_in_its_phase",
     ("layer.gate.log_theta.data[R // 2 :] = -5.0", "layer.gate.log_theta.data[R:] = -5.0")),
    ("experiments/decoder.py measure", "a_seed_decides_which_sentences_share_a", ('f"batches {seed}"', '"batches"')),
    ("experiments/decoder.py data_of", "held_out_sentences_and_those_to_tune_on_are", ("if row not in held_out]", "]")),
    ("experiments/figures.py measure", "figure_1_adapts_one_place_and_no_other",
     ('if place not in ("", matrix, f"block-{block}"):', 'if place not in ("", matrix):')),
    ("experiments/ladder.py rungs", "the_ladder_leads_from_the_papers_recipe_to_ours_by_one_change_a_rung",
     ("recipe = replace(recipe, **values)", "recipe = replace(Recipe.paper(), **values)")),
    ("experiments/planted_ranks.py measure", "a_task_has_the_noise_of_its_name", ("NOISE[task] *", "0.1 *")),
    ("experiments/planted_ranks.py measure", "what_is_learned_is_scored_on_inputs", ("seed + 10**6", "seed")),
    ("experiments/planted_ranks.py cut_by_svd", "a_cut_by_svd_keeps_the", ("        canonicalize(layer)\n", "")),
    ("experiments/real.py data_of", "rows_to_train_on_to_tune_on_and_to_score_are_different_rows",
     ("everything[n_tune : n_tune + n_score], everything[n_tune + n_score :]",
      "everything[n_tune : n_tune + n_score], everything[n_tune:]")),
    ("experiments/arms.py place_ranks", "a_seed_decides_how_ranks_are_shuffled", ('f"shuffle {seed}"', '"shuffle"')),
    ("experiments/compare.py measure", "a_run_trains_on_as_many_rows_as_asked_for_and_alora_holds",
     ("lambda: -loss_of(model, held_out)", "lambda: loss_of(model, held_out)"),
     ("encode(train[: args.rows])", "encode(train)")),
    ("experiments/shift.py Data.batch_of", "only_in_the_negative_control_the", ('self.task == "chance"', "False")),
    ("experiments/shift.py model_of", "the_scale_of_an_update_is_that", ("scale * (arm.start or 0)", "scale * 8")),
    ("experiments/shift.py Data.__init__", "a_seed_draws_the_language_and_every_arm_guesses_the_same",
     ('random.Random(f"shift {seed}")', 'random.Random("shift")')),
    ("experiments/shift.py train", "a_seed_draws_the_language_and_every_arm_guesses_the_same",
     ("    data.generator.manual_seed(seed)  # the same words are hidden for every arm\n", "")),
    ("experiments/shift.py train", "alora_scores_ranks_on_texts_that_it_does_not_train_on_the_same_in_every_run",
     ("        batches, held_out = hold_out(data.train, 1)", "        held_out = hold_out(data.train, 1)[1]")),
    ("experiments/study.py fit", "a_seed_decides_the_order_of_the_rows", ("seed=seed, batch_of", "seed=0, batch_of")),
    ("experiments/study.py Study.run", "a_run_that_diverges_is", ("not isfinite(values", "values is None and (values")),
    ("experiments/study.py Study.run", "every_run_is", ("        if has_row(path, **key):\n            return\n", "")),
    ("experiments/study.py Study.tune", "tuning_has_a_seed_of_its_own_and_runs_take_the_best_mean_over_its_tasks",
     ("self.run(args, path, key, task, arm, TUNE_SEED, trial)", "self.run(args, path, key, task, arm, 0, trial)")),
    ("experiments/study.py Study.ranking", "tuning_has_a_seed_of_its",
     ("pair[0] if self.lowest else -pair[0]", "pair[0]")),
    ("experiments/study.py Study.ranking", "of_equal_trials_runs_take_the_one_with_the_lowest",
     (", pair[1])", ")")),
    ("experiments/table2.py data_of", "held_out_sentences_are_asked_for_the_other_sentiment_and_are_not_trained_on",
     ("asked = [(sentence, not praise) for", "asked = [(sentence, praise) for")),
    ("experiments/tables.py gaps_closed", "the_share_of_a_gap_is_that_of_paired_seeds",
     ("(lows - mine).mean() / (lows - highs).mean()", "((lows - mine) / (lows - highs)).mean()"),
     ("deviations = (lows - mine) - share * (lows - highs)", "deviations = lows - mine")),
    ("experiments/tables.py interval", "intervals_are_students", ("len(values) - 1", "len(values)")),
    ("experiments/tables.py t_quantile", "intervals_are_students", ("** (df - 1))", "** df)")),
    ("experiments/tables.py paired", "differences_are_over_the_seeds_that_both", ("set.intersection(*", "set.union(*")),
    ("glue/decoder.py batch_of", "the_loss_is_the_mean_that_a_loop_over_all_words_gives",
     ("positions[i, start - 1 : len(words) - 1] = True", "positions[i, start - 1 : len(words)] = True")),
    ("glue/metrics.py pearson", "a_constant_whose_mean_is_rounded_has_no_correlation",
     ("np.ptp(predicted) == 0 or np.ptp(gold) == 0", "not x.any() or not y.any()")),
    ("glue/mini.py change", "labels_of_pairs_follow_from_the_words_alone", (" if concept not in taken]", "]")),
    ("glue/pretrain.py corrupt", "corruption_hides_words_only_and_of_a", ("ids.roll(1, 0)", "ids.roll(1, 1)")),
    ("glue/pretrain.py trained_once", "of_two_runs_that_pre", ("shutil.rmtree(part, ignore_errors=True)", "pass")),
    ("glue/tasks.py read_rows", "official_layouts_are_read_with_any_line_end_and_byte_order", ("utf-8-sig", "utf-8")),
    ("glue/tokens.py MiniTokenizer.encode_pair", "truncation_takes_from_the_longer_sentence",
     ("(a if len(a) > len(b) else b).pop()", "(b or a).pop()")),
    ("hub/adapters.py _layer_state", "saved_adapters_come_back_exactly", ('"r0": layer.r0', '"r0": layer.r'),
     ("fixed=gate.fixed", "fixed=None")),
    ("hub/adapters.py _is_sound", "a_state_that_is_damaged_is_refused_and", ("bool(value.isfinite().all())", "True")),
    ("hub/adapters.py copy_of", "a_snapshot_shares_no_memory_with_the_model_nor_two_models_with", (".clone()", "")),
    ("hub/adapters.py load_adapter_state", "a_snapshot_shares_no_memory_with_the_model_nor_two_models_with",
     ('saved["log_theta"].to(device, copy=True)', 'saved["log_theta"].to(device)'),
     ("value.to(device, copy=True)", "value.to(device)")),
    ("hub/adapters.py load_adapter_state", "loaded_layers_are_in_the_mode_of_the_model",
     (".train(before.training)", "")),
    ("hub/adapters.py load_adapter_state", "names_are_those_of_the_model_before",
     ("reversed(list(model.named_modules()))", "model.named_modules()"),
     ("wrapped, model = model, bare(model)", "wrapped = model")),
    ("hub/adapters.py load_adapter_state", "a_model_that_is_one_layer_is_replaced",
     ("return wrapped if replaced is model else replaced", "return wrapped")),
    ("hub/adapters.py bare", "names_are_those_of_the_model_before", (" | nn.DataParallel", "")),
    ("hub/adapters.py plain_name", "names_are_those_of_the_model_before", ('if part != "_orig_mod"', "")),
    ("hub/adapters.py save_adapter", "weights_of_another_phase_or_run_are_refused", ("finished_layers(model)", "pass")),
    ("hub/adapters.py load_adapter_state", "saved_adapters_come_back_exactly",
     ("new = {id(layer): layer.base for layer in salora_layers(model).values()}", "new = {}")),
    ("hub/checkpoints.py read_index", "files_that_are_missing_or_damaged_are", (' or ".." in Path(shard).parts', "")),
    ("hub/checkpoints.py check_regular", "pipes_devices_and_folders_are_refused_rather_than_waited_for",
     ("not stat.S_ISREG(mode)", "not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))")),
    ("hub/checkpoints.py write_atomically", "an_atomic_write_that_fails_leaves_what_was_there",
     ("(OSError, RuntimeError) as error", "OSError as error")),
    ("hub/decoder.py load_decoder", "what_cannot_be_used_is_one_line_and_exit_status_2",
     ('    if info["missing_keys"]:  # they would be random', "    if False:")),
    ("hub/peft.py export_peft", "classifiers_give_the", ("B * (layer.scale * largest / alpha)", "B * layer.scale")),
    ("hub/peft.py check_heads", "a_head_opens_in_peft_or_is_refused_where_its_name_is_the",
     ("if name.endswith(head) and", 'if name.endswith("." + head) and'),
     ('names = modules | {f"{target}.{part}" for target in targets for part in IN_ADAPTED}', "names = set(modules)"),
     ("and name != head", ""), ('names |= {f"{head}.{part}" for head in heads for part in IN_SAVED}', "pass")),
    ("hub/peft.py check_heads", "random_names_open_in_peft_with_the_same_outputs_or_are_refused",
     ('modules & {f"{head}.{part}" for part in IN_SAVED}', "set()")),
    ("hub/peft.py check_heads", "what_peft_has_no_words_for_is", ('.replace(r"\\.", ".")', "")),
    ("hub/peft.py module_names", "random_names_open_in_peft_with_the_same_outputs_or_are_refused",
     ("if rename is str or list(module.parameters(recurse=False)):", "if isinstance(module, nn.Linear):")),
    ("hub/peft.py outermost", "random_names_open_in_peft_with", ("and parent not in closed ", "")),
    ("hub/peft.py export_peft", "a_compiled_model_is_exported_and", ("model = bare(model)", "pass")),
    ("hub/peft.py import_peft", "a_compiled_model_is_exported_and", ("linears(bare(model))", "linears(model)")),
    ("hub/peft.py import_peft", "tensors_that_do_not_fit_are_refused_by_name",
     ("if A is None and B is None:", "if A is None:")),
    ("hub/checkpoints.py write_tensors", "an_export_leaves_no_weights_of_an_earlier_one",
     ("(folder / other).unlink(missing_ok=True)", "pass"), ("(folder / safetensors).unlink(missing_ok=True)", "pass")),
    ("hub/peft.py look_up", "of_several_patterns_the_first_that_fits",
     ("in table.items()", "in reversed(table.items())"),
     ("in table.items()", "in sorted(table.items(), key=lambda item: -len(item[0][0]))")),
    ("hub/peft.py exportable_layers", "what_peft_has_no_words_for_is", ("if len(names) > len(layers):", "if False:")),
    ("hub/peft.py write_adapter", "a_failed_export_leaves_the_files_as_they", ("allow_nan=False", "allow_nan=True")),
    ("hub/peft.py literal_name", "settings_that_are", ('and not re.fullmatch(r"[\\w.-]+", text)', "and not text")),
    ("hub/peft.py look_up", "patterns_are_compared_as_names_like_peft_matches_them",
     ('not whole and module.endswith("." + name)', 'module.endswith("." + name)')),
    ("hub/roberta.py", "models_equal_transformers", ('"key": "attention.self.key"', '"key": "attention.self.value"')),
    ("hub/roberta.py load_pretrained", "tensors_that_are_missing", ("check_tensors(stored, shapes, folder)", "pass")),
    ("hub/roberta.py read_config", "impossible_configs_are_refused_by", ("not least <= value <= most", "value > most"),
     ("None if field.name in SIZES else field.default", "field.default")),
    ("hub/roberta.py load_pretrained", "models_equal_transformers_in_both_directions",
     ("(0, 0, config.pad_token_id + 1, 0)", "(0, 0, 0, config.pad_token_id + 1)")),
    ("hub/roberta.py load_pretrained", "an_encoder_opens_its_own_folder",
     ("config = replace(config, **changes)", "pass")),
    ("hub/roberta.py load_pretrained", "dropout_of_the_head_is_the",
     ('changes = {"classifier_dropout": None, **changes}', "pass"),
     ("!= config.hidden_dropout_prob:", "is not None:")),
    ("hub/roberta.py load_pretrained", "names_from_compiled_and_distributed",
     ("if short_name(name) in stored:", "if False:")),
    ("hub/roberta.py short_name", "names_from_compiled_and_distributed", (r"(module\.)*", ""),
     ("plain_name(name))", "name)")),
    ("hub/roberta.py label_names", "a_folder_holds_the_weights_once_and", ("{name: i for", "{name: i + 1 for")),
    ("hub/checkpoints.py write_tensors", "a_folder_holds_the_weights_once", ("if prefer:", "if True:"),
     (', {"format": "pt"}', "")),
    ("hub/roberta.py save_pretrained", "a_folder_holds_the_weights_once", ("model = bare(model)", "pass")),
    ("tiny_transformer.py SequenceClassifier.__init__", "dropout_of_the_head_is_the",
     ("if rate is None else rate", "if not rate else rate")),
    ("hub/roberta.py read_config", "what_a_config_leaves_out_is_what_published", ('"layer_norm_eps": 1e-12, ', "")),
    ("hub/roberta.py load_pretrained", "impossible_configs_are_refused_by_field_before_they_cost_anything",
     ("if depth != config.num_hidden_layers:", "if depth < config.num_hidden_layers:")),
    ("hub/tokenizers.py errors_of", "panics_become_errors_and_interruptions_pass",
     ('isinstance(error, Exception) or type(error).__name__ == "PanicException"', "True"),
     ("{' '.join(str(error).split())}", "{error}")),
    ("hub/tokenizers.py RealTokenizer.encode", "random_folders_are_tokenized", (", direction=self.side", "")),
    ("hub/tokenizers.py RealTokenizer.__init__", "a_tokenizer_json_needs_a",
     ("max(tokenizer.get_vocab().values(), default=-1) + 1", "tokenizer.get_vocab_size()")),
    ("hub/tokenizers.py load_tokenizer", "files_that_contradict_each_other_or_are_not", ("if absent:", "if False:")),
    ("hub/tokenizers.py load_tokenizer", "a_tokenizer_json_needs_a", ("MODELS.get(kind, model) != model", "False")),
    ("hub/tokenizers.py class_of", "random_folders_are_tokenized", ('settings.get("tokenizer_class") or ', "")),
    ("hub/tokenizers.py class_of", "files_that_contradict_each_other_or_are_not",
     ('config.get("tokenizer_class") or ', "")),
    ("hub/tokenizers.py check_tokens", "files_that_contradict_each_other_or_are_not",
     ("if i != expected:", "if False:"), ("        if unknown:", "        if False:")),
    ("hub/tokenizers.py read", "code_that_a_folder_brings", ("trust_remote_code=False", "trust_remote_code=True")),
    ("hub/tokenizers.py read", "random_folders_are_tokenized", (", tokenizer.truncation_side", ', "right"')),
    ("hub/tokenizers.py copy_tokenizer", "the_class_that_follows_from_a_foreign", ("[1] != kind", "[1] == kind")),
    ("hub/tokenizers.py copy_tokenizer", "a_copied_tokenizer_reads_the_same", ("{**read_json_if_there(path), ", "{")),
    ("hub/tokenizers.py check_tokens", "a_tokenizer_json_needs_a", ("if not around.ids:", "if False:")),
    ("hub/plain_tokenizers.py understood_settings", "without_transformers_settings_that_are_not",
     ("        if not understood:", "        if False:"), ("type(value) is bool or", "True or"),
     ("understood = value is True", "understood = True"), ("understood = not value or", "understood = True or")),
    ("hub/plain_tokenizers.py understood_settings", "both_spellings_of_a_robertas",
     ('if "added_tokens_decoder" not in settings:', "if True:"),
     ('settings |= read_json_if_there(folder / "special_tokens_map.json")', "pass")),
    ("hub/plain_tokenizers.py tokens_to_add", "both_spellings_of_a_robertas",
     ("fields if isinstance(fields, dict) else {}", "{}")),
    ("hub/plain_tokenizers.py tokens_to_add", "settings_and_added_tokens_of_a_bert_decide",
     ('"normalized": content not in named', '"normalized": True'), (" if settings.get(key)]", "]")),
    ("hub/plain_tokenizers.py tokens_to_add", "random_folders_are_tokenized",
     ('legacy = read_json_if_there(folder / "added_tokens.json")', "legacy = {}"),
     ('by_id |= {token["id"]: token for token in whole.get("added_tokens") or []}', "pass"),
     (', "special": True}', "}")),
    ("hub/plain_tokenizers.py build", "random_folders_are_tokenized", ('settings.get("truncation_side") or ', "")),
    ("hub/plain_tokenizers.py bert", "settings_and_added_tokens_of_a_bert_decide",
     ("strip_accents=strip_accents", "strip_accents=None"), ("lowercase=do_lower_case", "lowercase=True")),
    ("hub/plain_tokenizers.py bert", "random_folders_are_tokenized",
     ("handle_chinese_chars=tokenize_chinese_chars", "handle_chinese_chars=True")),
    ("hub/plain_tokenizers.py roberta", "both_spellings_of_a_robertas",
     ("(add_prefix_space=add_prefix_space)", "(add_prefix_space=False)")),
    ("hub/plain_tokenizers.py template", "random_folders_are_tokenized", ("$B:1 [SEP]:1", "$B:0 [SEP]:0")),
    ("hub/trainer.py RankCallback.on_train_begin", "trainer_gives_a_llama_its_budget",
     ("state.global_step > 0", "False")),
    ("salora.py merge", "pruned_and_merged_layers_equal_the_masked_one_whatever", (", requires_grad=False", "")),
    ("guard.py Guard.after_backward", "a_layer_that_no_gradient", ("all(layer.B.grad", "any(layer.B.grad")),
    ("peers/__init__.py allocator_for", "a_method_starts_as_its_paper_says_trains_what_the", ("warmup=warmup, ", "")),
    ("peers/adalora.py budget_at", "adalora_budget_falls_along_a_cubic_from_all_triplets_to", ("left**3", "left**2")),
    ("peers/adalora.py mean_norm", "adalora_goes_step_by_step_where_the_authors",
     ("(layer.A @ layer.A.T - I).norm()", "(layer.A @ layer.A.T - I).square().sum()"), (" / len(norms)", "")),
    ("peers/adalora.py AdaLoRA.before_step", "adalora_goes_step_by_step_where_the_authors", ("STD * normal", "normal")),
    ("peers/adalora.py AdaLoRA.__init__", "adalora_keeps_its_budget_in_the_shortest", ("max(2, ", "max(1, ")),
    ("peers/adalora.py AdaLoRA.measure", "adalora_goes_step_by_step_where_the_authors",
     ("(I - I_bar).abs()", "I - I_bar")),
    ("peers/adalora.py AdaLoRA.measure", "a_layer_that_no_gradient", ("0.0 if p.grad is None else p.grad", "p.grad")),
    ("peers/adalora.py AdaLoRA.after_step", "adalora_goes_step_by_step_where_the_authors",
     ("t % self.interval == 0", "True"), ("t, end = self.step,", "t, end = self.step + 1,")),
    ("peers/adapters.py Adapter.forward", "an_adapter_is_a_bottleneck_with_a_residual", ("h + self.up", "self.up")),
    ("peers/adapters.py Adapter.forward", "houlsbys_adapters_come_after_the",
     ("self.dropout(self.base(x))", "self.base(x)")),
    ("peers/adapters.py houlsby", "houlsbys_adapters_come_after_the", ("block.dropout = nn.Identity()", "pass")),
    ("peers/adapters.py houlsby", "a_method_starts_as_its_paper_says_trains", ("norm.requires_grad_(True)", "pass")),
    ("peers/allocator.py Allocator.finish", "a_peer_starts_as_the_frozen_model_and_finishes_as_plain_lora_with_the",
     ("layer.B *= layer.gate.settled().to(layer.B.dtype)", "pass")),
    ("peers/allocator.py Allocator.before_step", "a_step_out_of_order_a", ("step != self.step", "step < self.step")),
    ("peers/alora.py ALoRA.importance", "alora_scores_are", ("everything - without + alone", "everything - without")),
    ("peers/alora.py ALoRA.choose", "alora_moves_a_thirty_second_of_its_open", ("round(CLOSED *", "int(CLOSED *")),
    ("peers/alora.py ALoRA.choose", "alora_closes_the_worst_and_opens_where_none_was", ("if i not in losers", "")),
    ("peers/alora.py ALoRA.start_afresh", "alora_opens_ranks_afresh_so_that_opening", ("layer.B[:, j] = 0", "pass"),
     (" / k**0.5", "")),
    ("peers/alora.py share_out", "alora_gives_ranks_in_turn_and_the_most", ("-means.get(i", "means.get(i")),
    ("peers/bias.py Rescaled.forward", "ia3_equals_rescaled_weights",
     ("self.base(x * self.scale)", "self.base(x) * self.scale.mean()")),
    ("peers/prefix.py PrefixBlock.attention", "dropout_in_the_attention", (" if self.training else 0.0", "")),
    ("peers/prefix.py PrefixBlock.attention", "prefix_attention_is_a_mixture_of", ("value=True", "value=False")),
    ("peers/prefix.py PromptedTransformer.forward", "a_prompt_is_read_like_words_in_front_of", ("value=1", "value=0")),
    ("peers/rm_lora.py RMLoRA.r_hat", "rm_lora_changes", ("round(self.share", "int(self.share")),
    ("peers/rm_lora.py RMLoRA.after_backward", "a_layer_that_no_gradient", ("if p.grad is not None:", "if True:")),
    ("peers/rm_lora.py RMLoRA.after_step", "rm_lora_changes", ("tensor.index_copy_(axis, rest, before)", "pass")),
    ("peers/rm_lora.py RMLoRA.after_backward", "the_orthogonality_of_b_and_a_is_part_of_the_gradient",
     ("(self.beta * orthogonality(self.layers)).backward()", "pass")),
    ("peers/sora.py SoRA.before_step", "what_a_peer_draws_is_decided_by_its_seed_and_by_nothing",
     ("normal(g.shape, self.noise, g)", "normal(g.shape, torch.Generator().manual_seed(0), g)")),
    ("peers/sora.py soft_threshold", "sora_prox_is_the_closed_form", ("(x.abs() - xi).clamp_min(0)", "(x.abs() - xi)")),
    ("peers/sora.py shrink", "sora_shrinks_as_its_authors_do", ("left.abs() < xi", "left.abs() < 0")),
    ("peers/sora.py lambda_at", "sora_lambda_rises_in_seven_levels", ("(level / (levels - 1))", "(level / levels)"),
     ("(epoch - FIRST)", "epoch")),
    ("peers/sora.py SoRA.after_backward", "sora_goes_step_by_step_where",
     ("(L1 * torch.cat(self.gates).abs().mean()).backward()", "pass")),
    ("peers/sora.py SoRA.threshold", "sora_goes_step_by_step_where",
     ("if self.times_lr else lam", "if not self.times_lr else lam")),
]  # fmt: skip
FAULTS = [(place, old, new, test) for place, test, *pairs in TABLE for old, new in pairs]


def broken(place, old, new):
    """(file, its text with the fault). Raises ValueError where the text is not there once in this place."""
    file, _, function = place.partition(" ")
    source = (ROOT / file).read_text(encoding="utf-8")
    node, lines = ast.parse(source), source.splitlines(keepends=True)
    first, end = 0, len(lines)
    for name in function.split(".") if function else []:
        found = [inner for inner in ast.walk(node) if inner is not node and getattr(inner, "name", None) == name]
        if not found:
            raise ValueError(f"{place} is not there")
        node = found[0]
        first, end = node.lineno - 1, node.end_lineno
    text = "".join(lines[first:end])
    if text.count(old) != 1 or old == new:
        raise ValueError(f"{place} holds {old!r} {text.count(old)} times, but should once, and {new!r} must be another")
    changed = "".join(lines[:first]) + text.replace(old, new) + "".join(lines[end:])
    try:
        compile(changed, file, "exec")
    except SyntaxError:
        raise ValueError(f"{place} with {new!r} in the place of {old!r} is no program") from None
    return file, changed


def test_id(test):
    """pytest's id of a test. Raises ValueError unless exactly one has this name or, where none has, begins with it."""
    start, bracket, parameters = test.partition("[")
    named, begun = [], []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for name in re.findall(r"^ *def test_(\w+)\(", path.read_text(encoding="utf-8"), re.M):
            whole = f"tests/{path.name}::test_{name}{bracket}{parameters}"
            named += [whole] if name == start else []
            begun += [whole] if name.startswith(f"{start}_") else []
    found = named or begun
    if len(found) != 1:
        raise ValueError(f"{len(found)} tests are called {start}, or begin so")
    return found[0]


def check(rows):
    """Raises ValueError for all rows that have lost their place or their test."""
    problems = []
    for *fault, test in rows:
        try:
            broken(*fault)
            test_id(test)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def run_tests(tests, change=None):
    """Run tests in a copy of the tree, in this process. change: (file, its new text). Returns pytest's status and what
    it said."""
    torch.set_num_threads(1)
    os.environ.pop("SALORA_IMPL", None)
    flags = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:randomly", "--hypothesis-profile=mutants"]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()) as said, redirect_stderr(said):
        copy = Path(folder).resolve() / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "*venv*"))
        if change:
            (copy / change[0]).write_text(change[1], encoding="utf-8")
        os.chdir(copy)
        status = pytest.main([*flags, f"--rootdir={copy}", *tests])
        os.chdir(ROOT)
    return int(status), said.getvalue()


def attempt(row):
    """(whether the fault was noticed, what pytest said)."""
    *fault, test = row
    status, said = run_tests([test_id(test)], broken(*fault))
    return status == 1, said  # 1: tests ran, and some failed


def tests_pass(tests):
    """(whether these tests pass on the tree as it is, what pytest said)."""
    status, said = run_tests(tests)
    return status == 0, said


PROCESSES = get_context("forkserver")  # in which what takes long to import is there already
PROCESSES.set_forkserver_preload(["torch._dynamo", "hypothesis", "pytest", "matplotlib.figure"])


def send(end, function, item):
    end.send(function(item))


def in_process(function, item):
    """function(item), from a process of its own, which may start others. Raises EOFError where it fails."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=send, args=(theirs, function, item))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def in_processes(function, items):
    """Yields function(item) in order, each from a process of its own, as many at a time as there are cores."""
    with ThreadPool(os.cpu_count()) as threads:
        yield from threads.imap(partial(in_process, function), items)


def attempt_all(rows):
    """Try all faults, and print a line for each. Returns the lines of those that no test noticed."""
    survivors = []
    for row, (noticed, said) in zip(rows, in_processes(attempt, rows)):
        place, old, new, test = (" ".join(text.split()) for text in row)
        line = f"{place}: {old}  ->  {new or 'nothing'}  ({test})"
        print(("noticed  " if noticed else "SURVIVED ") + line + ("" if noticed else "\n" + said), flush=True)
        survivors += [] if noticed else [line]
    return survivors


def main(words):
    started, rows = time.time(), [row for row in FAULTS if words in " ".join(row)]
    check(rows)
    survivors = attempt_all(rows)
    print(f"{len(rows) - len(survivors)} of {len(rows)} faults noticed in {time.time() - started:.0f} s")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
