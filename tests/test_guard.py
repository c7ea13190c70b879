"""Loud misuse: whatever would go wrong silently in a loop with a RankAllocator is refused, and nothing has changed."""

import copy
import pickle
import re
import warnings

import loops
import pytest
import torch
import torch.distributed as dist
from loops import STEPS, T_END, T_START, Run, assert_refused, assert_same, mlp, sgd
from strategies import row
from torch import nn

from hub.adapters import adapter_state, load_adapter_state, save_adapter
from rank_allocator import RankAllocator, Recipe
from salora import adapt, merge, salora_layers

TURNS = (0, T_START, T_END, STEPS)


def due_at(step):
    """The hook that is due at a step, as a letter of Run.do."""
    return "F" if step == STEPS else "B"


# Hooks

WRONG = ["-A", "-S", "-O", "-F", "B-B", "B-S", "B-O", "B-F", "B-D", "BA-A", "BA-B", "BA-S", "BA-F", "BA-D",
         "BAO-A", "BAO-B", "BAO-O", "BAO-F", "BAO-D", "BAOS-A", "BAOS-O", "BAOS-S", "BAOS-F"]  # fmt: skip


@pytest.mark.parametrize("step", [0, T_START, T_END])
def test_a_hook_forgotten_doubled_or_out_of_order_is_refused_and_what_was_due_is_still_possible(step):
    """The letters are those of Run.do: what was done, and what is called instead of what is due."""
    match = r"was called where .* due|finish\(\) after|called twice"
    for hooks in WRONG:
        done, wrong = hooks.split("-")
        if step == T_END and wrong == "F" and len(done) % 4 == 0:
            continue  # from here on a loop may stop early
        run = Run().train(stop=step)
        run.do(done)
        with row(hooks):
            assert_refused(run, lambda: run.do(wrong), match, RuntimeError)
            run.do("BAOS"[len(done) % 4 :])


def test_steps_of_another_number_too_many_and_too_few_are_refused():
    run = Run()
    assert_refused(run, lambda: run.allocator.before_step(7), "load_state_dict to go on with a run")
    run.train(stop=3)
    for other in (0, 2, 4):
        assert_refused(run, lambda: run.allocator.before_step(other), "where step 3 is due: steps are counted through")
    assert_refused(run, run.allocator.finish, r"finish\(\) after 3 steps, but ranks are decided after 10")
    run.train(3)
    assert_refused(run, lambda: run.allocator.before_step(STEPS), "there are 20 steps: call finish")
    run.allocator.finish()
    for again in "BFD":
        assert_refused(run, lambda: run.do(again), "was called after finish.*: this allocator is done")
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


def test_gates_that_no_gradient_reaches_are_refused_and_zero_grad_and_clipping_leave_theirs_alone():
    plain, run = Run(budget=0.4), Run(budget=0.4)
    for step in range(STEPS):
        run.allocator.before_step(step)
        run.loss(run.batches[step]).backward()
        nn.utils.clip_grad_norm_([layer.gate.log_theta for layer in run.layers], 1e-9)
        run.allocator.after_backward()
        for layer in run.layers:
            assert layer.gate.log_theta.grad is None
        run.optimizer.step()
        run.model.zero_grad(set_to_none=step % 2 == 0)
        run.allocator.after_step()
        run.scheduler.step()
    run.optimizer.zero_grad()
    assert_same(run.snapshot(), plain.train().snapshot())

    run = Run().train(stop=T_START + 1)
    for layer in run.layers:
        layer.gate.log_theta.requires_grad_(False)
    run.do("B")
    assert_refused(run, run.allocator.after_backward, "no gradient has reached log_theta")


def test_gradients_that_are_gone_before_the_step_are_refused():
    run = Run()
    run.do("BA")
    run.optimizer.zero_grad()
    assert_refused(run, run.optimizer.step, "the gradients are gone: call zero_grad after after_step")


def test_a_closure_does_its_own_backward_pass_and_after_backward():
    run = Run()
    run.do("BA")
    assert_refused(run, lambda: run.optimizer.step(run.closure), "call after_backward in the closure")
    run = Run()
    run.do("B")
    with pytest.raises(RuntimeError, match=r"optimizer.step\(\) was called where after_backward is due"):
        run.optimizer.step(lambda: run.loss(run.batches[0]))


@pytest.mark.equation("12", "9")
def test_a_penalty_is_added_under_no_grad_too():
    run, plain = (Run(recipe=Recipe.paper()).train(stop=T_START + 1) for _ in range(2))
    for each in (run, plain):
        each.do("B")
    with torch.no_grad():
        run.allocator.after_backward()
    plain.allocator.after_backward()
    assert_same([layer.A.grad for layer in run.layers], [layer.A.grad for layer in plain.layers])


def test_an_allocator_cannot_be_copied_or_pickled():
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="use state_dict and load_state_dict"):
            copied(Run().allocator)


# Models and optimizers


def test_a_second_allocator_on_one_model_is_refused():
    run = Run()
    assert_refused(run, lambda: RankAllocator(run.model, run.optimizer, 9), "another RankAllocator is at work on 0")


def test_short_windows_and_a_dropout_that_the_recipe_does_not_have_are_warned_of():
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1), nn.Linear(6, 3))
    for recipe, steps, expected in (
        (Recipe.ours(), 1000, ["the recipe has dropout 0 .*, but the model has nn.Dropout with p = 0.1"]),
        (Recipe.ours(dropout=0.1), 30, ["gates train for 3 of 30 steps; in fewer than 50"]),
        (Recipe.paper(), 1000, ["in 300 steps of 0.01 log_theta moves by at most 3, and needs about 14"]),
        (Recipe.paper(), 5000, []),
        (Recipe.paper_scaled(), 1000, []),
        (Recipe.svd(dropout=None), 1000, []),
    ):
        model = adapt(copy.deepcopy(net), ["0"], r=4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            RankAllocator(model, sgd(model), steps, recipe=recipe)
        found = [warning for warning in caught if warning.category is UserWarning]
        with row(steps):
            assert len(found) == len(expected) and all(warning.filename == __file__ for warning in found)
            assert all(re.search(*pair) for pair in zip(expected, [str(warning.message) for warning in found]))


def test_a_head_that_trains_but_not_in_the_optimizer_is_warned_of():
    model = adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), ["0"], r=4)
    optimizer = sgd(model)
    model[1].requires_grad_(True)
    with pytest.warns(UserWarning, match="^1.weight requires a gradient, but the optimizer does not hold it: make the"):
        RankAllocator(model, optimizer, 1000)


def test_a_layer_that_the_model_passes_by_is_warned_of_when_the_window_opens():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.two(torch.tanh(nn.functional.linear(x, self.one.weight)))

    run = Run(lambda: (adapt(Bypass(), ["one", "two"], r=4), (6,)))
    run.train(stop=T_START)
    with pytest.warns(UserWarning, match="no gradient has reached one so far: does the model use these weights"):
        run.do("B")
    run = Run().train(stop=T_START)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.do("B")


REFUSED = [  # (model -> the arguments of RankAllocator, error)
    (lambda m: (nn.Linear(2, 2), sgd(m), 9), "has no adapters: call adapt"),
    (lambda m: (m, sgd(nn.Linear(2, 2)), 9), "does not hold A and B of 0: make it after adapt"),
    (lambda m: (m, sgd(m, lambda p: p.requires_grad and len(p) == 5), 9), "does not hold A and B of 0"),
    (lambda m: (m, sgd(m, lambda p: True), 9), "holds log_theta of 0"),
    (lambda m: (loops.FSDP(m), sgd(m), 9), "FullyShardedDataParallel shards adapters.*: use fully_shard"),
    (lambda m: (m, sgd(m, kind=loops.DeepSpeed), 9), "DeepSpeedOptimizer shards adapters"),
    (lambda m: (m, loops.Accelerated(sgd(m)), 9), "use bf16, which needs none"),
    (lambda m: (m.bfloat16(), sgd(m), 9), "log_theta of 0 is torch.bfloat16"),
    (lambda m: (m, sgd(m), 0), "total_steps must be a whole number of at least 1, got 0"),
    (lambda m: (m, sgd(m), 2.5), "total_steps must be a whole number of at least 1, got 2.5"),
    (lambda m: (m, sgd(m), -1), "got -1; for Trainer, set max_steps"),
    (lambda m: (m, sgd(m), 9, "0.5"), r"budget must be in \(0, 1\], got '0.5'"),
    (lambda m: (m, sgd(m), 9, 0.09), "a budget of 0.09 has room for 14 parameters, but the smallest triplet has 15"),
    (lambda m: (m, sgd(m), 9, 0.5, None, 0, True), "reduce must be .*, got True"),
    (lambda m: (m, sgd(m), 9, 0.0), r"budget must be in \(0, 1\], got 0.0"),
    (lambda m: (m, sgd(m), 9, 1.5), r"budget must be in \(0, 1\], got 1.5"),
    (lambda m: (m, sgd(m), 9, float("nan")), r"budget must be in \(0, 1\], got nan"),
]


def test_what_an_allocator_cannot_work_with_is_refused_with_a_reason():
    for arguments, match in REFUSED:
        model, optimizer, *rest = arguments(mlp()[0])
        with row(match):
            with pytest.raises(ValueError, match=match):
                RankAllocator(model, optimizer, *rest)
            assert not any(layer.allocating for layer in salora_layers(model).values())
            assert not getattr(optimizer, "optimizer", optimizer)._optimizer_step_pre_hooks


def test_a_schedule_that_runs_past_the_last_step_is_refused_rather_than_followed_below_0():
    run = Run()
    assert run.allocator.lr_factor(STEPS) == 0
    with pytest.raises(RuntimeError, match=rf"lr_factor\({STEPS + 1}\), but there are {STEPS} steps"):
        run.allocator.lr_factor(STEPS + 1)


def test_training_that_diverged_before_the_window_is_named():
    run = Run().train(stop=T_START)
    run.layers[1].A.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at T_start, for 2: has training diverged"):
        run.do("B")


LATER = [  # (what happens to a run between two steps, error)
    (lambda run: run.layers[1].requires_grad_(False), "A and B of 2 are frozen"),
    (lambda run: run.optimizer.add_param_group({"params": [run.layers[0].gate.log_theta]}), "holds log_theta of 0"),
    (lambda run: load_adapter_state(run.model, adapter_state(run.model)), "adapters have been replaced"),
    (lambda run: run.model.bfloat16(), "log_theta of 0 is torch.bfloat16"),
]


def test_what_happens_to_a_model_or_an_optimizer_later_is_refused_at_the_next_phase():
    for step in TURNS:
        for change, match in LATER:
            run = Run().train(stop=step)
            change(run)
            with row(step, match):
                assert_refused(run, lambda: run.do(due_at(step)), match, ValueError)


def test_weights_of_another_phase_or_run_are_refused_and_nothing_is_saved_or_merged_before_finish(tmp_path):
    for early, late in ((0, STEPS), (T_START, STEPS), (T_START + 1, STEPS), (2, T_START + 1), (T_END, T_END + 1)):
        run = Run().train(stop=early)
        weights = copy.deepcopy(run.model.state_dict())
        run.train(early, late).model.load_state_dict(weights)
        with row(early, late):
            assert_refused(run, lambda: run.do(due_at(late)), "gates must be .*, but those of 0 are")
            for use in (merge, lambda model: save_adapter(model, tmp_path / "a.pt")):
                assert_refused(run, lambda: use(run.model), "still at work on 0: call its finish")
    run, other = Run().train(), Run(budget=0.25).train()
    run.model.load_state_dict(other.model.state_dict())
    assert_refused(run, lambda: run.do("F"), "state are of different steps")
    other.do("F")
    save_adapter(other.model, tmp_path / "a.pt")


@pytest.mark.parametrize("step", TURNS)
def test_several_processes_must_say_how_gradients_are_reduced_and_then_must_agree(monkeypatch, step):
    run = Run().train(stop=step)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda ends, op=None: ends[-1].add_(1e-9))  # one log_theta of the other
    due = due_at(step)
    assert_refused(run, lambda: run.do(due), 'several processes: pass reduce="mean"')
    run.allocator.reduce = "mean"
    assert_refused(run, lambda: run.do(due), "the processes' adapters or heads differ")
    monkeypatch.setattr(dist, "all_reduce", lambda ends, op=None: ends)
    run.do(due)


def test_an_enabled_grad_scaler_is_refused_before_its_first_step_and_a_disabled_one_is_not(monkeypatch):
    """Although the stack is searched for one at the first step only."""
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
        for _ in range(2):  # whoever catches the error meets it again
            with pytest.raises(RuntimeError, match="use bf16, which needs none"):
                scaler.step(run.optimizer)
        assert_same(run.model.state_dict().values(), before.values())
    monkeypatch.setattr("guard.walk_stack", lambda frame: pytest.fail("the stack is walked again"))
    run.optimizer.zero_grad()
    run.do("BAOS")


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_whose_state_cannot_be_sliced_is_refused_after_its_first_step(make):
    run = Run(make=make, **({"max_iter": 1} if make is torch.optim.LBFGS else {}))
    run.allocator.before_step(0)
    run.optimizer.step(run.closure)
    assert_refused(run, run.allocator.after_step, f"{make.__name__} keeps .*: use AdamW or SGD")


# States


@pytest.mark.parametrize("step", [2, T_START + 2, T_END + 2])
def test_a_state_of_other_decisions_or_of_another_phase_is_refused(step):
    state = Run().train(stop=step).allocator.state_dict()
    for other in ({"budget": 0.25}, {"recipe": Recipe.paper()}, {"recipe": Recipe(window=(0.2, 0.6))}):
        run = Run(**other)
        match = r"the saved run had .* \(now .*\): a run goes on"
        assert_refused(run, lambda: run.allocator.load_state_dict(state), match)
    for at in {2, T_START + 2, T_END + 2} - {step}:
        run = Run().train(stop=at)
        match = "gates must be .*, but those|of different steps"
        assert_refused(run, lambda: run.allocator.load_state_dict(state), match)
