"""RankAllocator in training loops that are not ours: the same budget, the same bits after a resume, and loud misuse."""

import copy
import io
from dataclasses import replace

import loops
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from loops import OURS, STEPS, T_END, T_START, Run, assert_finished, assert_refused, assert_same, conv_net, mlp, sgd
from strategies import seeds, sizes
from torch import nn

from budget import CONTROLLERS, GateSchedule, RankAllocator, Recipe, expected_density, kept_density
from salora import adapt, adapter_state, load_adapter_state, merge, salora_layers, save_adapter

# Three loops


@pytest.mark.parametrize("density", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("build", [mlp, conv_net])
def test_a_loop_by_hand_with_a_scheduler_gives_any_net_its_budget(build, density):
    run = Run(build, density).train()
    run.allocator.finish()
    assert_finished(run.allocator, run.model, lambda model: model(run.batches[0][0]), density)


@pytest.mark.parametrize("recipe", [OURS, Recipe.paper()], ids=["ours", "paper"])
@pytest.mark.parametrize("build", [mlp, conv_net])
def test_a_loop_resumed_in_any_phase_goes_on_equal_to_the_bit(build, recipe):
    whole = Run(build, recipe=recipe).train()
    for stop in (3, T_START, T_START + 3, T_END, T_END + 3):
        file = io.BytesIO()
        torch.save([part.state_dict() for part in Run(build, recipe=recipe).train(stop=stop).parts], file)
        file.seek(0)
        resumed = Run(build, recipe=recipe)
        for part, state in zip(resumed.parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        assert_same(resumed.train(stop).snapshot(), whole.snapshot())


def test_a_callback_of_trainer_gives_a_llama_its_budget_and_resumes_equal_to_the_bit(tmp_path):
    """At a density at which some layers lose all their triplets."""
    trainer, allocator = loops.llama_under_trainer(tmp_path, 0.1)
    trainer.train()
    expected = [p.clone() for p in trainer.model.state_dict().values()]
    assert min(layer.r for layer in allocator.layers.values()) == 0
    assert_finished(allocator, trainer.model, lambda model: model(torch.arange(3, 12)[None]).logits, 0.1)
    for stop in (7, 14):  # in the window, and after T_end
        trainer, allocator = loops.llama_under_trainer(tmp_path, 0.1, save_strategy="no")
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert_same(trainer.model.state_dict().values(), expected)
        assert_finished(allocator, trainer.model, lambda model: model(torch.arange(3, 12)[None]).logits, 0.1)


def test_trainers_best_model_is_refused_at_the_start_and_weights_of_another_phase_later(tmp_path):
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=7)
    trainer, allocator = loops.llama_under_trainer(tmp_path, **best)
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        trainer.train()
    for early, late in ((0, STEPS), (T_START, STEPS), (T_START + 1, STEPS), (2, T_START + 1), (T_END, T_END + 1)):
        run = Run().train(stop=early)
        weights = copy.deepcopy(run.model.state_dict())
        run.train(early, late).model.load_state_dict(weights)
        due = "F" if late == STEPS else "B"
        assert_refused(run, lambda: run.do(due), "weights are those of another phase|but the model's are not")


def test_a_compiled_model_trains_as_the_plain_one_to_the_bit():
    torch._dynamo.reset()
    compiled = Run()
    compiled.model.compile(backend="eager")
    assert_same(compiled.train().snapshot(), Run().train().snapshot())


# Parameters keep their identity

OPTIMIZERS = {
    "momentum": (torch.optim.SGD, dict(momentum=0.9)),
    "adamw": (torch.optim.AdamW, dict(foreach=False)),
    "amsgrad": (torch.optim.AdamW, dict(amsgrad=True)),
    "foreach": (torch.optim.AdamW, dict(foreach=True)),
    "fused": (torch.optim.AdamW, dict(fused=True)),
    "accelerate": (loops.prepared, {}),
}


@pytest.mark.parametrize("make,flags", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_pruning_slices_gradients_and_every_moment_to_the_triplets_that_stay(make, flags):
    """Which stay is read off log_theta, all of whose values differ; the rest is Python's own indexing."""
    run = Run(make=make, recipe=replace(OURS, canonical=False), **flags).train(stop=T_END)
    state, sides = run.optimizer.state, []
    for layer in run.layers:
        layer.A.grad, layer.B.grad = torch.randn_like(layer.A), torch.randn_like(layer.B)
        for p, axis in ((layer.A, 0), (layer.B, 1)):
            theta = layer.gate.log_theta
            sides.append((layer, p, axis, p.detach().clone(), p.grad, dict(state[p]), theta, theta.tolist()))
    run.allocator.before_step(T_END)
    for layer, p, axis, data, grad, moments, theta, values in sides:
        assert p is (layer.A, layer.B)[axis] and theta is layer.gate.log_theta, "the same objects"
        kept = [values.index(value) for value in theta.tolist()]
        assert len(set(values)) == 5 and 0 < len(kept) < 5
        index = kept if axis == 0 else (slice(None), kept)
        assert torch.equal(p, data[index]) and torch.equal(p.grad, grad[index])
        assert state[p].keys() == moments.keys() and any(m.shape == data.shape for m in moments.values())
        for key, moment in moments.items():
            assert torch.equal(state[p][key], moment[index] if moment.shape == data.shape else moment), key


@pytest.mark.parametrize("make,flags", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_clip_lists_and_schedulers_made_before_training_go_on_after_pruning(make, flags):
    run = Run(make=make, **flags)
    clip_list, norms = list(run.model.parameters()), []

    def clip(optimizer, *rest):
        nn.utils.clip_grad_norm_(clip_list, 1e-3)
        grads = [p.grad for p in run.model.parameters() if p.grad is not None and p.requires_grad]
        norms.append(nn.utils.get_total_norm(grads).item())

    run.allocator.optimizer.register_step_pre_hook(clip)
    run.train(stop=T_END + 1)
    before = [layer.B.detach().clone() for layer in run.layers]
    run.train(T_END + 1)
    assert len(norms) == STEPS and max(norms) <= 1.01e-3, "the list of the start clips what is there at the end"
    assert all(not torch.equal(layer.B, old) for layer, old in zip(run.layers, before)), "and what stays still trains"
    assert run.scheduler.get_last_lr() == [0.01 * run.allocator.lr_factor(STEPS)]


def test_an_average_of_weights_fails_loudly_where_it_cannot_follow():
    run = Run().train(stop=T_START)
    average = torch.optim.swa_utils.AveragedModel(run.model)
    average.update_parameters(run.model)
    run.train(T_START, T_END + 1)
    with pytest.raises((ValueError, RuntimeError)):
        average.update_parameters(run.model)


# Misuse

WRONG = ["-A", "-S", "-O", "-F", "B-B", "B-S", "B-O", "B-F", "B-D", "BA-A", "BA-B", "BA-S", "BA-F", "BA-D",
         "BAO-A", "BAO-B", "BAO-O", "BAO-F", "BAO-D", "BAOS-A", "BAOS-O", "BAOS-S", "BAOS-F"]  # fmt: skip


@pytest.mark.parametrize("step", [0, T_START, T_END])
@pytest.mark.parametrize("moments", WRONG)
def test_a_moment_forgotten_doubled_or_out_of_order_is_refused_and_what_was_due_is_still_possible(moments, step):
    """The letters are those of Run.do: what was done, and what is called instead of what is due."""
    done, wrong = moments.split("-")
    run = Run().train(stop=step)
    run.do(done)
    assert_refused(run, lambda: run.do(wrong), r"was called where .* due|finish\(\) after|called twice", RuntimeError)
    run.do("BAOS"[len(done) % 4 :])


def test_steps_of_another_number_too_many_and_too_few_are_refused():
    run = Run()
    assert_refused(run, lambda: run.allocator.before_step(7), "load_state_dict to go on with a run")
    run.train(stop=3)
    for other in (0, 2, 4):
        assert_refused(run, lambda: run.allocator.before_step(other), "where step 3 is due: each step comes once")
    assert_refused(run, run.allocator.finish, r"finish\(\) after 3 of 20 steps")
    run.train(3)
    assert_refused(run, lambda: run.allocator.before_step(STEPS), "there are 20 steps: call finish")
    run.allocator.finish()
    for again in "BFD":
        assert_refused(run, lambda: run.do(again), "where nothing more is due")
    assert_refused(run, lambda: run.allocator.load_state_dict({}), "make a new RankAllocator")
    anew = RankAllocator(run.model, run.optimizer, STEPS)
    assert_refused(run, lambda: anew.before_step(0), "triplets have been pruned already")


@pytest.mark.parametrize("step", [0, T_START, T_END])
def test_a_step_without_gradients_or_without_noise_in_the_window_is_refused(step):
    run = Run().train(stop=step)
    run.allocator.before_step(step)
    assert_refused(run, run.allocator.after_backward, r"no gradient has reached .* after loss.backward")
    run.model.eval()
    run.loss(run.batches[0]).backward()
    if step == T_START:
        assert_refused(run, run.allocator.after_backward, r"in eval mode, .* call model.train")
        run.model.train()
    run.allocator.after_backward()


def test_an_adapter_cannot_be_saved_as_finished_before_finish(tmp_path):
    run = Run()
    for step in (0, T_START, T_END, STEPS):
        run.train(run.allocator.step, step)
        for model in (run.model, copy.deepcopy(run.model)):
            assert_refused(run, lambda: save_adapter(model, tmp_path / "a.pt"), "call the allocator's finish")
    assert not list(tmp_path.iterdir())
    run.allocator.finish()
    save_adapter(run.model, tmp_path / "a.pt")


REFUSED = [  # (model -> the arguments of RankAllocator, error)
    (lambda m: (nn.Linear(2, 2), sgd(m), 9), "has no adapters: call adapt"),
    (lambda m: (m, sgd(nn.Linear(2, 2)), 9), "does not hold A and B of 0: make it after adapt"),
    (lambda m: (m, sgd(m, lambda p: p.requires_grad and len(p) == 5), 9), "does not hold A and B of 0"),
    (lambda m: (m, sgd(m, lambda p: True), 9), "holds log_theta of 0"),
    (lambda m: (loops.FSDP(m), sgd(m), 9), "FullyShardedDataParallel shards parameters"),
    (lambda m: (loops.DDP(m), sgd(m), 9), "DistributedDataParallel loses sight of a parameter"),
    (lambda m: (m, sgd(m, kind=loops.DeepSpeed), 9), "DeepSpeedOptimizer shards parameters"),
    (lambda m: (m, loops.Accelerated(sgd(m)), 9), "use bf16, which needs none"),
    (lambda m: (m.bfloat16(), sgd(m), 9), "log_theta of 0 is torch.bfloat16"),
    (lambda m: (m, sgd(m), 0), "total_steps must be a whole number of at least 1, got 0"),
    (lambda m: (m, sgd(m), 2.5), "total_steps must be a whole number of at least 1, got 2.5"),
    (lambda m: (m, sgd(m), 9, 0.0), r"density must be in \(0, 1\], got 0.0"),
    (lambda m: (m, sgd(m), 9, 1.5), r"density must be in \(0, 1\], got 1.5"),
    (lambda m: (m, sgd(m), 9, float("nan")), r"density must be in \(0, 1\], got nan"),
]


@pytest.mark.parametrize("arguments,match", REFUSED, ids=[match for _, match in REFUSED])
def test_what_an_allocator_cannot_work_with_is_refused_with_a_reason(arguments, match):
    model, optimizer, *rest = arguments(mlp()[0])
    with pytest.raises(ValueError, match=match):
        RankAllocator(model, optimizer, *rest)
    assert not any(layer.allocating for layer in salora_layers(model).values())
    assert not getattr(optimizer, "optimizer", optimizer)._optimizer_step_pre_hooks


LATER = [  # (what happens to a run between two steps, error)
    (lambda run: run.optimizer.add_param_group({"params": [run.layers[0].gate.log_theta]}), "holds log_theta of 0"),
    (lambda run: load_adapter_state(run.model, adapter_state(run.model)), "adapters have been replaced"),
    (lambda run: merge(run.model), "adapters have been replaced"),
    (lambda run: run.model.bfloat16(), "log_theta of 0 is torch.bfloat16"),
]


@pytest.mark.parametrize("step", [0, T_START, T_END, STEPS])
@pytest.mark.parametrize("change,match", LATER, ids=["log_theta", "loaded", "merged", "bf16"])
def test_what_happens_to_a_model_or_an_optimizer_later_is_refused_at_the_next_phase(change, match, step):
    run = Run().train(stop=step)
    change(run)
    assert_refused(run, lambda: run.do("F" if step == STEPS else "B"), match, ValueError)


@pytest.mark.parametrize("step", [0, T_START, T_END, STEPS])
def test_several_processes_must_say_that_they_sum_gradients_and_then_must_agree(monkeypatch, step):
    run = Run().train(stop=step)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda ends, op: ends[-1].add_(1e-9))  # one log_theta of another process
    due = "F" if step == STEPS else "B"
    assert_refused(run, lambda: run.do(due), "several processes: .* gradients_are_summed=True")
    run.allocator.guard.gradients_are_summed = True
    assert_refused(run, lambda: run.do(due), "the processes' adapters differ")
    monkeypatch.setattr(dist, "all_reduce", lambda ends, op: ends)
    run.do(due)


def test_an_enabled_grad_scaler_is_refused_before_its_first_step_and_a_disabled_one_is_not():
    for enabled in (True, False):
        run, scaler = Run(), torch.amp.GradScaler("cpu", enabled=enabled)
        run.allocator.before_step(0)
        scaler.scale(run.loss(run.batches[0])).backward()
        run.allocator.after_backward()
        if not enabled:
            scaler.step(run.optimizer)
            run.allocator.after_step()
            continue
        before = copy.deepcopy(run.model.state_dict())
        with pytest.raises(RuntimeError, match="use bf16, which needs none"):
            scaler.step(run.optimizer)
        assert_same(run.model.state_dict().values(), before.values())


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_whose_state_cannot_be_sliced_is_refused_after_its_first_step(make):
    run = Run(make=make)
    run.do("BA")
    run.optimizer.step(lambda: run.loss(run.batches[0]))
    assert_refused(run, run.allocator.after_step, f"{make.__name__} keeps .*: use AdamW or SGD")


# States


@pytest.mark.parametrize("step", [2, T_START + 2, T_END + 2])
def test_a_state_of_another_plan_or_of_another_phase_is_refused(step):
    state = Run().train(stop=step).allocator.state_dict()
    for other in ({"density": 0.25}, {"recipe": Recipe.paper()}, {"recipe": Recipe(window=(0.2, 0.6))}):
        run = Run(**other)
        assert_refused(run, lambda: run.allocator.load_state_dict(state), "the saved run had .* but this one has")
    for at in {2, T_START + 2, T_END + 2} - {step}:
        run = Run().train(stop=at)
        assert_refused(run, lambda: run.allocator.load_state_dict(state), "but the model's are not|of another phase")


@pytest.mark.parametrize("interrupted", ["B", "BA", "BAO"])
def test_after_an_interruption_in_the_middle_of_a_step_the_same_objects_go_on_from_a_saved_state(interrupted):
    for stop in (2, T_START + 2, T_END - 1):
        run = Run().train(stop=stop)
        states = [copy.deepcopy(part.state_dict()) for part in run.parts]
        run.train(stop, stop + 1).do(interrupted)
        run.model.zero_grad()
        for part, state in zip(run.parts, states, strict=True):
            part.load_state_dict(state)
        assert_same(run.train(stop).snapshot(), Run().train().snapshot())


# Any shapes, any plan


@st.composite
def plans(draw):
    """(shapes of linear maps, rank, density, steps, recipe): windows may be empty, from the start or to the end."""
    edges = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])
    choices = dict(window=st.tuples(edges, edges).map(lambda window: tuple(sorted(window))),
                   controller=st.sampled_from(CONTROLLERS), beta=st.sampled_from([0.0, 0.1]), canonical=st.booleans(),
                   spread=st.sampled_from([0.0, 8.0]), survivors=st.sampled_from(["one", "median"]))  # fmt: skip
    recipe = Recipe(**{name: draw(values) for name, values in choices.items()})
    shapes = draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4))
    return shapes, draw(st.integers(1, 6)), draw(st.floats(0.01, 1)), draw(st.integers(1, 9)), recipe


@given(plans(), seeds)
@example(plan=([(1, 1)], 1, 1 - 1e-16, 1, Recipe.ours(window=(0.0, 0.0))), seed=0)
def test_any_plan_on_any_shapes_has_its_phases_on_time_and_never_overspends(plan, seed):
    shapes, r, density, steps, recipe = plan
    most = density + 1e-6  # 0.29 x 12,800 is 3,711.9999... in floats, and 3,712 are allowed
    torch.manual_seed(seed)
    model = adapt(nn.ModuleList(nn.Linear(k, d) for d, k in shapes), r"\d+", r)
    layers, schedule = list(salora_layers(model).values()), GateSchedule(steps, *recipe.window)
    inputs = [torch.randn(3, k, requires_grad=True) for _, k in shapes]
    optimizer = sgd(model, kind=torch.optim.Adam)
    allocator = RankAllocator(model, optimizer, steps, density, recipe, seed)
    for step in range(steps):
        allocator.before_step(step)
        free, decided = schedule.T_start <= step < schedule.T_end, step >= schedule.T_end
        assert all((layer.gate.fixed is None) == free for layer in layers), f"step {step}"
        assert kept_density(layers) <= most if decided else all(layer.r == r for layer in layers)
        sum((layer(x) - 1).square().mean() for layer, x in zip(layers, inputs)).backward()
        allocator.after_backward()
        optimizer.step()
        allocator.after_step()
        optimizer.zero_grad()
        if free and recipe.controller == "projection":
            C, aim = expected_density(layers).item(), schedule.target_at(step, density)
            assert abs(C - aim) <= 1e-5, f"C is {C}, but should be {aim}"
    allocator.finish()
    kept = sum(layer.r * layer.triplet_size for layer in layers)
    assert kept == sum(r * layer.triplet_size * kept_density([layer]) for layer in layers), "what is closed is gone"
    assert kept_density(layers) <= most
    if schedule.window == 0:
        assert abs(allocator.C_end - 11 / 12) <= 1e-5, "decided by the odds that gates start with"
    elif recipe.controller == "projection":
        assert abs(allocator.C_end - density) <= 1e-5
