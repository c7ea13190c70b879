"""RankAllocator in training loops that are not ours: any shapes, the same budget, and the same bits after a resume."""

import copy
import io
from dataclasses import replace

import loops
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from loops import OURS, STEPS, T_END, T_START, Run, assert_finished, assert_same, conv_net, mlp, sgd
from strategies import row, seeds, sizes
from torch import nn

from budget import GateSchedule, expected_density, kept_density
from rank_allocator import CONTROLLERS, RankAllocator, Recipe
from salora import adapt, merge, salora_layers

# Three loops


@pytest.mark.parametrize("build,budget", [(mlp, 0.25), (mlp, 0.8), (conv_net, 0.5)])
def test_a_loop_by_hand_with_a_scheduler_gives_any_net_its_budget(build, budget):
    run = Run(build, budget).train()
    run.allocator.finish()
    assert_finished(run.allocator, run.model, lambda model: model(run.batches[0][0]), budget)


@pytest.mark.parametrize("build,recipe", [(mlp, OURS), (conv_net, Recipe.paper())], ids=["mlp-ours", "conv-paper"])
def test_a_loop_resumed_in_any_phase_goes_on_equal_to_the_bit(build, recipe):
    whole = Run(build, recipe=recipe).train()
    for stop in (3, T_START, T_START + 3, T_END, T_END + 3):
        file = io.BytesIO()
        torch.save([part.state_dict() for part in Run(build, recipe=recipe).train(stop=stop).parts], file)
        file.seek(0)
        resumed = Run(build, recipe=recipe)
        for part, state in zip(resumed.parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        with row(stop):
            assert_same(resumed.train(stop).snapshot(), whole.snapshot())


def test_after_an_interruption_in_the_middle_of_a_step_the_same_objects_go_on_from_a_saved_state():
    whole = Run().train()
    for stop, interrupted in ((2, "BA"), (T_START + 2, "BAO"), (T_END - 1, "B")):
        run = Run().train(stop=stop)
        states = [copy.deepcopy(part.state_dict()) for part in run.parts]
        run.train(stop, stop + 1).do(interrupted)
        run.model.zero_grad()
        for part, state in zip(run.parts, states, strict=True):
            part.load_state_dict(state)
        with row(stop, interrupted):
            assert_same(run.train(stop).snapshot(), whole.snapshot())


def test_a_step_with_a_closure_trains_as_the_plain_loop_to_the_bit():
    plain, closed = Run().train(), Run()
    for step, batch in enumerate(closed.batches):
        closed.allocator.before_step(step)
        closed.optimizer.step(lambda: closed.closure(batch))
        closed.allocator.after_step()
        closed.optimizer.zero_grad()
        closed.scheduler.step()
    assert_same(closed.snapshot(), plain.snapshot())


def test_a_loop_may_stop_early_once_ranks_are_decided_and_an_average_of_weights_may_begin():
    for stop in (T_END, T_END + 3):
        run = Run().train(stop=stop)
        if stop == T_END:
            run.do("F")
        else:
            average = torch.optim.swa_utils.AveragedModel(run.model)
            average.update_parameters(run.train(stop, stop + 2).model)
            run.do("F")
            assert type(merge(average.module)[0]) is nn.Linear, "a copy does not wait for an allocator"
        with row(stop):
            assert_finished(run.allocator, run.model, lambda model: model(run.batches[0][0]), 0.5)


def test_a_compiled_model_is_one_graph_in_every_phase_and_trains_as_the_plain_one_to_the_bit():
    torch._dynamo.reset()
    compiled = Run()
    compiled.model.compile(backend="eager", fullgraph=True)  # a graph break is an error
    assert_same(compiled.train().snapshot(), Run().train().snapshot())


# Parameters keep their identity

OPTIMIZERS = {
    "momentum": (torch.optim.SGD, dict(momentum=0.9)),
    "amsgrad": (torch.optim.AdamW, dict(amsgrad=True)),
    "foreach": (torch.optim.AdamW, dict(foreach=True)),
    "fused": (torch.optim.AdamW, dict(fused=True)),
    "accelerate": (loops.prepared, {}),
}


@pytest.mark.parametrize("make,flags", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_pruning_slices_gradients_and_every_moment_and_clip_lists_and_schedulers_go_on(make, flags):
    """Which triplets stay is read off log_theta, all of whose values differ; the rest is Python's own indexing."""
    run = Run(make=make, recipe=replace(OURS, canonical=False), **flags)
    clip_list, norms = list(run.model.parameters()), []

    def clip(optimizer, *rest):
        nn.utils.clip_grad_norm_(clip_list, 1e-3)
        grads = [p.grad for p in run.model.parameters() if p.grad is not None and p.requires_grad]
        norms.append(nn.utils.get_total_norm(grads).item())

    run.allocator.optimizer.register_step_pre_hook(clip)
    run.train(stop=T_END)
    state, sides = run.optimizer.state, []
    for layer in run.layers:
        for p, axis in ((layer.A, 0), (layer.B, 1)):
            theta = layer.gate.log_theta
            p.grad = p.detach().clone()
            sides.append((layer, p, axis, p.grad, dict(state[p]), theta, theta.tolist()))
    run.allocator.before_step(T_END)
    for layer, p, axis, data, moments, theta, values in sides:
        assert p is (layer.A, layer.B)[axis] and theta is layer.gate.log_theta, "the same objects"
        kept = [values.index(value) for value in theta.tolist()]
        assert len(set(values)) == 5 and 0 < len(kept) < 5
        index = kept if axis == 0 else (slice(None), kept)
        assert torch.equal(p, data[index]) and torch.equal(p, p.grad)
        assert state[p].keys() == moments.keys() and any(m.shape == data.shape for m in moments.values())
        for key, moment in moments.items():
            assert torch.equal(state[p][key], moment[index] if moment.shape == data.shape else moment), key
    run.do("AOS")  # with gradients that stood there before
    run.optimizer.zero_grad()
    run.scheduler.step()
    before = [layer.B.detach().clone() for layer in run.layers]
    run.train(T_END + 1)
    assert len(norms) == STEPS and max(norms) <= 1.01e-3, "the list of the start clips what is there at the end"
    assert all(not torch.equal(layer.B, old) for layer, old in zip(run.layers, before)), "and what stays still trains"
    assert run.scheduler.get_last_lr() == [0.01 * run.allocator.lr_factor(STEPS)]


def test_moments_start_anew_at_t_start_with_canonical_triplets_only():
    """Rotated triplets are other directions, to which the old moments do not belong."""
    for canonical in (True, False):
        run = Run(recipe=replace(OURS, canonical=canonical)).train(stop=T_START)
        run.allocator.before_step(T_START)
        assert all(bool(run.optimizer.state[p]) != canonical for layer in run.layers for p in (layer.A, layer.B))


def test_a_finished_adapter_that_kept_all_triplets_can_be_allocated_anew():
    """As one that was loaded or imported: its gates are fixed until the next allocator begins."""
    run = Run(budget=1.0).train()
    run.do("F")
    again = Run(lambda: (run.model, (6,))).train()
    again.do("F")
    assert kept_density(again.layers) <= 0.5


# Recipes, and any shapes


def test_impossible_recipes_are_refused():
    for name, value in (("controller", "pid"), ("rule", "best"), ("survivors", "two")):
        with row(name), pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
            Recipe(**{name: value})
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        Recipe(window=(0.6, 0.5))
    nan = float("nan")
    impossible = dict(gate_lr=(0.0, -1, nan, "auto"), beta=(-0.1, nan, None), spread=(-1.0, nan), warmup=(-0.1, 1.1),
                      dropout=(-0.1, 7, "0"), canonical=("no", 1, None), restart=(0,))  # fmt: skip
    for name, values in impossible.items():
        for value in values:
            with row(name, value), pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
                Recipe(**{name: value})


@st.composite
def plans(draw):
    """(shapes of linear maps, rank, budget, steps, recipe): windows may be empty, from the start or to the end."""
    edges = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])
    choices = dict(window=st.tuples(edges, edges).map(lambda window: tuple(sorted(window))),
                   controller=st.sampled_from(CONTROLLERS), beta=st.sampled_from([0.0, 0.1]), canonical=st.booleans(),
                   spread=st.sampled_from([0.0, 8.0]), survivors=st.sampled_from(["one", "median"]))  # fmt: skip
    recipe = Recipe(**{name: draw(values) for name, values in choices.items()})
    shapes = draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4))
    return shapes, draw(st.integers(1, 6)), draw(st.floats(0.01, 1)), draw(st.integers(1, 9)), recipe


@given(plans(), seeds)
@example(plan=([(1, 1)], 1, 1 - 1e-16, 1, Recipe.ours(window=(0.0, 0.0))), seed=0)
@example(plan=([(4, 3), (2, 5)], 4, 0.3, 9, Recipe.ours(window=(0.0, 1.0))), seed=0)
def test_any_recipe_on_any_shapes_has_its_phases_on_time_and_never_overspends(plan, seed):
    shapes, r, budget, steps, recipe = plan
    torch.manual_seed(seed)
    model = adapt(nn.ModuleList(nn.Linear(k, d) for d, k in shapes), r"\d+", r)
    layers, schedule = list(salora_layers(model).values()), GateSchedule(steps, *recipe.window)
    inputs = [torch.randn(3, k, requires_grad=True) for _, k in shapes]
    optimizer = sgd(model, kind=torch.optim.Adam)
    least = min(layer.triplet_size for layer in layers) / sum(layer.r0 * layer.triplet_size for layer in layers)
    if least > budget:
        with pytest.raises(ValueError, match="the smallest triplet has"):
            RankAllocator(model, optimizer, steps, budget, recipe, seed)
        return
    allocator = RankAllocator(model, optimizer, steps, budget, recipe, seed)
    states = {"before": "held", "window": "free", "after": "fixed"}
    for step in range(steps):
        allocator.before_step(step)
        phase = schedule.phase(step)
        assert allocator.phase == phase and {layer.gate.state for layer in layers} == {states[phase]}, f"step {step}"
        assert kept_density(layers) <= budget if phase == "after" else all(layer.r == r for layer in layers)
        sum((layer(x) - 1).square().mean() for layer, x in zip(layers, inputs)).backward()
        allocator.after_backward()
        optimizer.step()
        allocator.after_step()
        optimizer.zero_grad()
        if phase == "window" and recipe.controller == "projection":
            C, aim = expected_density(layers).item(), schedule.target_at(step, budget)
            assert abs(C - aim) <= 1e-5, f"C is {C}, but should be {aim}"
    allocator.finish()
    kept = sum(layer.r * layer.triplet_size for layer in layers)
    assert kept == sum(r * layer.triplet_size * kept_density([layer]) for layer in layers), "what is closed is gone"
    assert kept_density(layers) <= budget
    if schedule.window_steps == 0:
        assert abs(allocator.C_end - 11 / 12) <= 1e-5, "decided by the odds that gates start with"
    elif recipe.controller == "projection":
        assert abs(allocator.C_end - budget) <= 1e-5
