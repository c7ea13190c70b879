"""What the papers of the compared methods state, method by method. How they run in the main job: test_program.py."""

import copy
import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_close, generator, installed_parameters, seeds
from torch import nn

import train_glue_mini
from budget import FixedRanks, kept_density
from hard_concrete import HardConcreteGate
from hub.peft import export_peft
from peers import PEERS, adalora, adapters, alora, rm_lora, sora
from peers.adalora import AdaLoRA, budget_at
from peers.alora import ALoRA, hold_out
from peers.rm_lora import RMLoRA
from peers.sora import SoRA, lambda_at, soft_threshold
from salora import adapt, merge, orthogonality, salora_layers, save_adapter
from tiny_transformer import SequenceClassifier, TinyTransformer, TransformerConfig

# A small net with triplets, and a loop around it


def net():
    torch.manual_seed(0)
    return adapt(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)), ["0", "2"], 4, 8)


INPUTS, LABELS = torch.randn(64, 6, generator=generator(1)), torch.arange(64) % 3


def loss_of(model):
    return nn.functional.cross_entropy(model(INPUTS), LABELS)


class Loop:
    """Trains the small net with a peer. `look(moment, loop)` is called after every moment of every step."""

    def __init__(self, make, steps=40, lr=0.02, look=lambda moment, loop: None, Optimizer=torch.optim.AdamW):
        self.model = net()
        self.optimizer = Optimizer([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        self.allocator = make(self.model, self.optimizer, steps)
        self.layers = list(self.allocator.layers.values())
        for step in range(steps):
            self.allocator.before_step(step)
            look("before_step", self)
            loss_of(self.model).backward()
            look("backward", self)
            self.allocator.after_backward()
            look("after_backward", self)
            self.optimizer.step()
            look("step", self)
            self.allocator.after_step()
            look("after_step", self)
            self.optimizer.zero_grad()


def scored(Peer):
    """ALoRA with the loss on the training rows as its score; other peers as they are."""

    def make(model, optimizer, steps, **options):
        options |= {"score": lambda: -loss_of(model).item()} if Peer is ALoRA else {}
        return Peer(model, optimizer, steps, **options)

    return make


ALLOCATING = {name: scored(peer.allocator) for name, peer in PEERS.items() if peer.allocator}
everyone = pytest.mark.parametrize("make", ALLOCATING.values(), ids=ALLOCATING)

# All that allocate


@pytest.mark.equation("peers")
@everyone
def test_a_peer_starts_as_the_frozen_model(make):
    model, outputs = net(), []
    frozen = merge(copy.deepcopy(model))(INPUTS)

    def look(moment, loop):
        if moment == "before_step":
            outputs.append(loop.model(INPUTS).detach())

    Loop(make, steps=4, look=look)
    assert torch.equal(outputs[0], frozen) and not torch.allclose(outputs[-1], frozen, atol=1e-3)


@pytest.mark.equation("peers")
@everyone
def test_finishing_leaves_plain_lora_with_the_same_outputs(make, tmp_path):
    loop = Loop(make)
    expected = loop.model.eval()(INPUTS)
    with pytest.raises(ValueError, match="ranks of 0 are not decided yet: call the allocator's finish"):
        save_adapter(loop.model, tmp_path / "adapter.pt")
    loop.allocator.finish()
    assert_close(loop.model(INPUTS), expected, 16)
    assert all(type(layer.gate) is HardConcreteGate for layer in loop.layers)
    assert all(torch.equal(layer.gate.fixed, torch.ones(layer.r)) for layer in loop.layers)
    assert loop.allocator.C_end == kept_density(loop.layers)
    save_adapter(loop.model, tmp_path / "adapter.pt")
    export_peft(loop.model, tmp_path / "peft")
    assert_close(merge(loop.model)(INPUTS), expected, 16)


@pytest.mark.equation("peers")
@everyone
def test_a_step_out_of_order_and_a_model_without_adapters_are_refused(make):
    model = net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    allocator = make(model, optimizer, 5)
    with pytest.raises(RuntimeError, match=r"before_step\(1\) where step 0 is due"):
        allocator.before_step(1)
    with pytest.raises(RuntimeError, match=r"finish\(\) after 0 of 5 steps"):
        allocator.finish()
    with pytest.raises(ValueError, match="no adapters: call adapt"):
        make(nn.Linear(2, 2), optimizer, 5)


@pytest.mark.equation("peers")
@pytest.mark.parametrize("make", [ALLOCATING["adalora"], ALLOCATING["rm-lora"]], ids=["adalora", "rm-lora"])
def test_the_orthogonality_of_b_and_a_is_part_of_the_gradient(make):
    weight = {"AdaLoRA": adalora.GAMMA, "RMLoRA": rm_lora.BETA}
    seen = []

    def look(moment, loop):
        if moment == "backward":
            seen.append([p.grad.clone() for layer in loop.layers for p in (layer.A, layer.B)])
        if moment == "after_backward":
            twin = copy.deepcopy(loop.model)
            twin.zero_grad()
            (weight[type(loop.allocator).__name__] * orthogonality(salora_layers(twin))).backward()
            pull = [p.grad for layer in salora_layers(twin).values() for p in (layer.A, layer.B)]
            now = [p.grad for layer in loop.layers for p in (layer.A, layer.B)]
            for before, extra, after in zip(seen[-1], pull, now, strict=True):
                moved = after != 0  # RM-LoRA masks the rest
                assert moved.any() and torch.allclose((before + extra)[moved], after[moved], atol=1e-6)

    Loop(make, steps=3, look=look)


# AdaLoRA


@pytest.mark.equation("adalora")
@given(st.data())
def test_adalora_budget_falls_along_a_cubic_from_all_triplets_to_the_last(data):
    T = data.draw(st.integers(1, 300))
    t_i = data.draw(st.integers(0, T - 1))
    t_f = data.draw(st.integers(0, T - t_i - 1))
    last = data.draw(st.integers(0, 200))
    first = data.draw(st.integers(last, 400))
    budgets = [budget_at(t, T, t_i, t_f, first, last) for t in range(T + 1)]
    assert budgets[: t_i + 1] == [first] * (t_i + 1)
    assert budgets[T - t_f :] == [last] * (t_f + 1)
    assert budgets == sorted(budgets, reverse=True)
    for t in range(t_i, T - t_f + 1):
        exact = last + (first - last) * Fraction(T - t_f - t, T - t_f - t_i) ** 3
        assert exact - 1 - 1e-6 < budgets[t] <= exact + 1e-6


@pytest.mark.equation("adalora")
@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_adalora_keeps_exactly_b_of_t_triplets_at_every_step(density):
    counts = []

    def look(moment, loop):
        if moment == "after_step":
            nonzero = sum(int(layer.gate.log_theta.count_nonzero()) for layer in loop.layers)
            counts.append((loop.allocator.step, nonzero, loop.allocator.status()["triplets"]))

    loop = Loop(lambda *parts: AdaLoRA(*parts, density=density, interval=1), look=look)
    assert (loop.allocator.t_i, loop.allocator.t_f) == (4, 20)
    for t, nonzero, triplets in counts:
        b = budget_at(t, 40, 4, 20, 8, int(8 * density))
        assert nonzero == b and triplets == f"{b}/8", f"after step {t}"


@pytest.mark.equation("adalora")
def test_adalora_lets_masked_values_move_between_two_allocations():
    counts = []

    def look(moment, loop):
        if moment == "after_step":
            counts.append(sum(int(layer.gate.log_theta.count_nonzero()) for layer in loop.layers))

    Loop(lambda *parts: AdaLoRA(*parts, density=0.25, interval=5), look=look)
    expected = [budget_at(t, 40, 4, 20, 8, 2) if t >= 20 or t in (5, 10, 15) else 8 for t in range(1, 41)]
    assert counts == expected


@pytest.mark.equation("adalora")
def test_adalora_breaks_ties_by_order_and_keeps_no_triplet_too_many():
    loop = Loop(AdaLoRA, steps=0)
    loop.allocator.allocate(3)  # all importances are 0
    assert [mask.tolist() for mask in loop.allocator.kept] == [[True] * 3 + [False], [False] * 4]


@pytest.mark.equation("adalora")
def test_adalora_brings_a_masked_triplet_back_when_it_becomes_important():
    """Its vectors stay while its value is 0, so that value has a gradient; a LoRA doublet that is pruned has none."""
    loop = Loop(lambda *parts: AdaLoRA(*parts, density=0.25, interval=100), steps=8)
    allocator, layer = loop.allocator, loop.layers[0]
    allocator.sensitivity[0].copy_(torch.tensor([0.0, 9, 9, 9]))
    allocator.uncertainty[0].fill_(1)
    vectors = layer.A[0].clone(), layer.B[:, 0].clone()
    allocator.allocate(3)
    assert layer.gate.log_theta[0] == 0 and not allocator.kept[0][0]
    assert torch.equal(layer.A[0], vectors[0]) and torch.equal(layer.B[:, 0], vectors[1])
    loop.optimizer.zero_grad()
    loss_of(loop.model).backward()
    assert layer.gate.log_theta.grad[0] != 0
    loop.optimizer.step()
    allocator.sensitivity[0].copy_(torch.tensor([9.0, 0, 9, 9]))
    allocator.allocate(3)
    assert layer.gate.log_theta[0] != 0 and allocator.kept[0].tolist() == [True, False, True, True]


@pytest.mark.equation("adalora")
def test_adalora_notes_no_sensitivity_once_the_budget_is_at_its_end():
    seen = []

    def look(moment, loop):
        if moment == "after_step":
            seen.append(torch.cat([x.flatten() for x in loop.allocator.sensitivity]))

    Loop(AdaLoRA, look=look)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen[:19]))
    assert all(torch.equal(seen[18], other) for other in seen[19:]), "T - t_f is 20"


@pytest.mark.equation("adalora")
def test_adalora_has_the_importances_and_masks_of_peft_on_the_same_gradients():
    peft = pytest.importorskip("peft")
    from peft.tuners.adalora import RankAllocator

    plan = dict(init_r=4, target_r=1, tinit=2, tfinal=10, deltaT=3, total_step=20, beta1=0.85, beta2=0.85)
    theirs = nn.Module()
    oracle, masked = [], []

    def names(loop):
        for i, layer in enumerate(loop.layers):
            values = {"lora_A": layer.A, "lora_B": layer.B, "lora_E": layer.gate.log_theta[:, None]}
            grads = {"lora_A": layer.A.grad, "lora_B": layer.B.grad, "lora_E": layer.gate.log_theta.grad[:, None]}
            for kind, value in values.items():
                yield i, kind, value, grads[kind]

    def look(moment, loop):
        t = loop.allocator.step + (moment != "after_step")  # after_step has counted already
        if moment == "after_backward":
            for i, kind, value, grad in names(loop):
                if not hasattr(theirs, f"m{i}"):
                    empty = {name: nn.ParameterDict() for name in ("lora_A", "lora_B", "lora_E")}
                    theirs.add_module(f"m{i}", nn.ModuleDict(empty))
                parameter = nn.Parameter(value.detach().clone())
                theirs.get_submodule(f"m{i}")[kind]["default"] = parameter
                parameter.grad = grad.clone()
            if not oracle:
                oracle.append(RankAllocator(theirs, peft.AdaLoraConfig(**plan), "default"))
            if t < 20 - 10:
                oracle[0].update_ipt(theirs)
        if moment == "step":
            for i, layer in enumerate(loop.layers):
                theirs.get_submodule(f"m{i}")["lora_E"]["default"].data.copy_(layer.gate.log_theta[:, None])
        if moment == "after_step":
            b, due = oracle[0].budget_schedule(t)
            ours = loop.allocator
            assert b == budget_at(t, 20, 2, 10, 8, 2)
            for i, s in enumerate(ours.importance()):
                parts = [oracle[0]._element_score(f"m{i}.lora_{kind}.default") for kind in "EAB"]
                assert torch.allclose(parts[0][:, 0] + parts[1].mean(1) + parts[2].mean(0), s, rtol=1e-5, atol=0)
            if due and b < 8:  # peft cannot keep all: it looks for the 0-th smallest
                oracle[0].mask_to_budget(theirs, b)
                masked.append(t)
            for i, layer in enumerate(loop.layers):
                E = theirs.get_submodule(f"m{i}")["lora_E"]["default"][:, 0]
                assert torch.equal(E, layer.gate.log_theta), "the same values are 0, and only when they are due"
                assert t not in masked or torch.equal(E != 0, ours.kept[i])

    def make(model, optimizer, steps):
        allocator = AdaLoRA(model, optimizer, steps, density=0.25, interval=3)
        allocator.t_i, allocator.t_f = 2, 10
        return allocator

    Loop(make, steps=20, look=look)
    assert masked == [3, 6, 9, *range(11, 21)]


# SoRA


@pytest.mark.equation("sora")
@given(st.floats(-3, 3), st.floats(0, 2))
def test_sora_prox_is_the_closed_form_minimizer(x, xi):
    """Brute force: no z of a fine grid, nor 0 itself, does better."""
    best = soft_threshold(torch.tensor([x], dtype=torch.float64), xi).item()
    cost = lambda z: (z - x) ** 2 / 2 + xi * abs(z)  # noqa: E731
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64).tolist()
    assert all(cost(best) <= cost(z) + 1e-12 for z in (*grid, 0.0, x))
    assert (best == 0) == (abs(x) <= xi), "exactly 0, not nearly"


@pytest.mark.equation("sora")
def test_sora_lambda_rises_in_seven_equal_levels_from_zero():
    values = [lambda_at(step, 70) for step in range(70)]
    assert values[0] == 0 and values[-1] == sora.LAMBDA and values == sorted(values)
    assert [values.count(value) for value in dict.fromkeys(values)] == [10] * 7
    steps = [b - a for a, b in itertools.pairwise(dict.fromkeys(values))]
    assert steps == pytest.approx([sora.LAMBDA / 6] * 6)


@pytest.mark.equation("sora")
@pytest.mark.parametrize("reach", [0.3, 1.0])
def test_sora_closes_exactly_the_gates_within_reach_of_0_that_no_gradient_moves(reach):
    """The gradients are zeroed before every step. Gates start as N(0, 1)."""
    first = []

    def look(moment, loop):
        if moment == "before_step":
            first.extend(layer.gate.log_theta.detach().clone() for layer in loop.layers)
            for group in loop.optimizer.param_groups:
                group["lr"] = 0.02 * loop.allocator.lr_factor(loop.allocator.step)
        if moment == "after_backward":
            for layer in loop.layers:
                layer.gate.log_theta.grad.zero_()

    loop = Loop(lambda *parts: SoRA(*parts, reach=reach, warmup=0.1), look=look)
    first = first[: len(loop.layers)]
    for g, layer in zip(first, loop.layers, strict=True):
        assert_close(layer.gate.log_theta, soft_threshold(g, reach), 64)
    assert sum(int((g.abs() < reach).sum()) for g in first) not in (0, 8), "some close, and some do not"


def test_runs_too_short_for_sora_or_alora_are_refused_in_one_line(tiny_weights, tmp_path, capsys):
    for flags, words in (
        (["--method", "sora", "--reach", "1", "--steps", "1"], "a reach of 1 needs more steps than 1"),
        (["--method", "alora", "--rows", "1"], "ALoRA needs one row to train on and another to score ranks on, got 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train_glue_mini.main([*flags, "--weights", str(tiny_weights), "--out", str(tmp_path / "run")])
        assert stopped.value.code == 2 and words in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.equation("sora")
def test_the_reach_of_sora_is_a_flag_of_the_main_job(tiny_weights, tmp_path):
    flags = ["--method", "sora", "--weights", str(tiny_weights), "--rows", "32", "--batch-size", "8", "--steps", "20"]
    kept = []
    for name, more in (("default", []), ("far", ["--reach", "1"])):
        kept.append(train_glue_mini.main([*flags, *more, "--out", str(tmp_path / name)])["adapter_params_kept"])
    assert kept[1] < kept[0]


@pytest.mark.equation("sora")
def test_sora_shrinks_gates_by_eta_times_lambda_after_every_step():
    before = []

    def look(moment, loop):
        if moment == "before_step":
            for group in loop.optimizer.param_groups:
                group["lr"] = 0.01 + 0.001 * loop.allocator.step
        gates = [layer.gate.log_theta.detach().clone() for layer in loop.layers]
        if moment == "step":
            before[:] = gates
        if moment == "after_step":
            step = loop.allocator.step - 1
            xi = (0.01 + 0.001 * step) * lambda_at(step, 40)
            for g, after in zip(before, gates, strict=True):
                assert torch.equal(after, soft_threshold(g, xi)), f"step {step}"
            assert loop.allocator.status()["lam"] == lambda_at(step, 40)

    Loop(SoRA, look=look)


@pytest.mark.equation("sora")
def test_sora_opens_a_gate_at_zero_again_where_the_loss_pulls_at_it():
    def look(moment, loop):
        g = loop.layers[0].gate.log_theta
        if moment == "before_step" and loop.allocator.step == 3:  # lambda is 0 in the first sixth
            g.data[1] = 0
        if moment == "after_step" and loop.allocator.step == 4:
            assert g[1] != 0

    Loop(SoRA, look=look)


@pytest.mark.equation("sora")
def test_sora_makes_exact_zeros_and_prunes_them_in_the_end():
    loop = Loop(lambda *parts: SoRA(*parts, highest=3.0), steps=100)
    nonzero = [int(layer.gate.log_theta.count_nonzero()) for layer in loop.layers]
    assert 0 < sum(nonzero) < 8
    assert f"{sum(nonzero)}/8" == loop.allocator.status()["triplets"]
    loop.allocator.finish()
    assert [layer.r for layer in loop.layers] == nonzero


@pytest.mark.equation("sora")
def test_sora_gates_have_no_weight_decay():
    loop = Loop(SoRA, steps=0)
    [group] = [g for g in loop.optimizer.param_groups if g["weight_decay"] == 0]
    assert [id(p) for p in group["params"]] == [id(layer.gate.log_theta) for layer in loop.layers]


# ALoRA


def without_moves(*parts):
    allocator = scored(ALoRA)(*parts)
    allocator.moves = {-1}
    return allocator


def ablated(model, keep):
    """The loss of a copy with only those triplets (matrix, rank) for which keep is true: their B is zeroed."""
    twin = copy.deepcopy(model).eval()
    for i, layer in enumerate(salora_layers(twin).values()):
        for j in range(layer.r):
            if not keep(i, j):
                layer.B.data[:, j] = 0
    return loss_of(twin).item()


@pytest.mark.equation("alora")
def test_alora_scores_are_those_of_brute_force_ablation():
    loop = Loop(without_moves, steps=5)
    scores = loop.allocator.importance()
    open_ranks = {(i, j) for i, layer in enumerate(loop.layers) for j in range(4) if layer.gate.fixed[j]}
    assert set(scores) == open_ranks and len(open_ranks) == 4
    for rank in open_ranks:
        whole = -ablated(loop.model, lambda i, j: True)
        without = -ablated(loop.model, lambda i, j: (i, j) != rank)
        alone = -ablated(loop.model, lambda i, j: (i, j) == rank)
        assert scores[rank] == pytest.approx(whole - without + alone, abs=1e-5), "Eq. (6)"


@pytest.mark.equation("alora")
def test_alora_scoring_changes_nothing():
    loop = Loop(scored(ALoRA), steps=5)
    before = copy.deepcopy(loop.model.state_dict())
    loop.allocator.importance()
    after = loop.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def open_counts(loop):
    return [int(layer.gate.fixed.sum()) for layer in loop.layers]


@pytest.mark.equation("alora")
@pytest.mark.parametrize("density,total", [(0.25, 2), (0.5, 4), (0.75, 6), (1.0, 8)])
def test_alora_conserves_its_budget_at_every_move(density, total):
    counts = []

    def look(moment, loop):
        if moment == "before_step":
            counts.append(open_counts(loop))

    loop = Loop(lambda *parts: scored(ALoRA)(*parts, density=density), look=look)
    assert loop.allocator.moves == {8, 10, 11, 12, 14, 16, 17, 18} and len(counts) == 40
    assert all(sum(now) == total for now in counts)
    assert max(counts[0]) - min(counts[0]) <= 1, "the same for all at first"
    assert any(now != counts[0] for now in counts) == (density < 1), "where there is room, ranks move"


@pytest.mark.equation("alora")
@given(st.data())
def test_alora_closes_the_worst_and_opens_where_none_was_closed(data):
    """For any scores and any open ranks: as many opened as closed, in the most important matrices with room."""
    loop = Loop(scored(ALoRA), steps=0)
    masks = [data.draw(st.lists(st.booleans(), min_size=4, max_size=4)) for _ in loop.layers]
    for layer, mask in zip(loop.layers, masks, strict=True):
        layer.gate.fix(torch.tensor(mask).float())
    ranks = [(i, j) for i, mask in enumerate(masks) for j, on in enumerate(mask) if on]
    scores = {rank: data.draw(st.floats(-5, 5)) for rank in ranks}
    close, receivers = loop.allocator.plan(scores)
    assert len(close) == len(receivers) <= max(1, round(alora.CLOSED * len(ranks)))
    losers = {i for i, _ in close}
    assert not losers & set(receivers)
    assert all(receivers.count(i) <= masks[i].count(False) for i in receivers)
    assert all(scores[rank] <= min((scores[r] for r in ranks if r not in close), default=9) for rank in close)
    if ranks and not close:
        worst = min(scores, key=scores.get)[0]
        assert all(all(mask) for i, mask in enumerate(masks) if i != worst), "nothing moves only where there is no room"


@pytest.mark.equation("alora")
def test_alora_shares_out_in_turns_the_most_important_matrix_first():
    means = {0: -1.0, 1: 3.0, 2: 0.5}
    assert alora.share_out(5, {0: 4, 1: 1, 2: 2, 3: 1}, means) == [1, 2, 0, 3, 2], "a matrix without ranks comes last"
    assert alora.matrix_means({(0, 1): 1.0, (0, 3): 2.0, (2, 0): 5.0}) == {0: 1.5, 2: 5.0}


@pytest.mark.equation("alora")
def test_alora_opens_ranks_afresh_so_that_opening_changes_no_output():
    loop = Loop(without_moves, steps=7)
    loop.layers[0].B.data[:, 2:] = 5.0  # of a closed rank: what it was, nobody sees
    for p in (loop.layers[0].A, loop.layers[0].B):  # as if all its ranks had been open before
        for name in ("exp_avg", "exp_avg_sq"):
            loop.optimizer.state[p][name].fill_(1.0)
    loop.allocator.plan = lambda scores: ([(1, 0)], [0])
    before = copy.deepcopy(loop.model)
    old_A = loop.layers[0].A.clone()
    loop.allocator.move()
    assert open_counts(loop) == [3, 1]
    list(salora_layers(before).values())[1].gate.fixed[0] = 0
    assert torch.equal(loop.model(INPUTS), before(INPUTS)), "only what was closed is missing"
    layer = loop.layers[0]
    assert not layer.B[:, 2].any() and not torch.equal(layer.A[2], old_A[2]) and torch.equal(layer.A[:2], old_A[:2])
    for name in ("exp_avg", "exp_avg_sq"):
        moments = loop.optimizer.state[layer.A][name], loop.optimizer.state[layer.B][name].T
        assert all(moment.any(1).tolist() == [True, True, False, True] for moment in moments)


@pytest.mark.equation("alora")
@given(st.integers(2, 200), st.integers(1, 40))
def test_alora_scores_on_rows_that_it_does_not_train_on(n, batch):
    train, held_out = hold_out(list(range(n)), batch)
    assert train + held_out == list(range(n)) and 1 <= len(held_out) <= max(1, min(batch, n // 8))


@pytest.mark.equation("alora")
def test_alora_in_the_main_job_scores_by_the_negative_loss_of_rows_held_out_of_training(
    monkeypatch, tiny_weights, tmp_path
):
    scored_on, trained_on, modes, losses = [], [], [], []
    loss_of, batches_of = train_glue_mini.loss_of, train_glue_mini.batches_of

    def noted(model, rows):
        scored_on.extend(rows)
        hook = model.register_forward_hook(lambda model, *rest: modes.append(model.training))
        losses.append(loss_of(model, rows))
        hook.remove()
        assert model.training, "and goes on training afterwards"
        return losses[-1]

    def batches(rows, *rest):
        trained_on.extend(rows)
        return batches_of(rows, *rest)

    def importance(allocator):
        assert allocator.score() == -losses[-1] < 0
        return {}

    for name, spy in (("loss_of", noted), ("batches_of", batches)):
        monkeypatch.setattr(train_glue_mini, name, spy)
    monkeypatch.setattr(ALoRA, "importance", importance)
    monkeypatch.setattr(ALoRA, "plan", lambda allocator, scores: ([], []))
    flags = ["--method", "alora", "--weights", str(tiny_weights), "--rows", "40", "--batch-size", "4", "--steps", "3"]
    train_glue_mini.main([*flags, "--dropout", "0.5", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert modes and not any(modes), "without dropout"
    texts = lambda rows: {tuple(ids) for ids, *_ in rows}  # noqa: E731
    assert len(trained_on) == 36 and len(texts(scored_on)) == 4 and not texts(scored_on) & texts(trained_on)


# RM-LoRA


@pytest.mark.equation("rm-lora")
@pytest.mark.parametrize("Optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("share,r_hat", [(0.25, 1), (0.5, 2), (1.0, 4)])
def test_rm_lora_changes_exactly_r_hat_rows_of_a_and_columns_of_b_a_step(Optimizer, share, r_hat):
    before, chosen = [], []

    def tensors(loop):
        found = []
        for layer in loop.layers:
            moments = [loop.optimizer.state.get(p, {}) for p in (layer.A, layer.B)]
            A = [layer.A, *(m for m in moments[0].values() if m is not None and m.dim())]
            B = [layer.B.T, *(m.T for m in moments[1].values() if m is not None and m.dim())]
            found.append([t.detach().clone() for t in (*A, *B)])
        return found

    def look(moment, loop):
        if moment == "before_step":
            before[:] = tensors(loop)
        if moment == "after_step" and loop.allocator.step > 1:  # at the first there are no moments yet, and B = 0
            for old, new in zip(before, tensors(loop), strict=True):
                changed = [(a != b).any(1) for a, b in zip(old, new, strict=True)]
                assert all(torch.equal(changed[0], other) for other in changed), "A, B and the moments of both"
                assert int(changed[0].sum()) == r_hat
                chosen.append(tuple(changed[0].tolist()))

    Loop(lambda *parts: RMLoRA(*parts, share=share), steps=30, look=look, Optimizer=Optimizer)
    every = [tuple(i in rows for i in range(4)) for rows in itertools.combinations(range(4), r_hat)]
    assert set(chosen) == set(every), "every choice of directions comes"


@pytest.mark.equation("rm-lora")
@pytest.mark.parametrize("share,r_hat", [(0.25, 1), (0.5, 2), (1.0, 4)])
def test_rm_lora_masks_the_gradients_themselves(share, r_hat):
    """So that a clipping of gradients, or another optimizer, sees only what is updated."""

    def look(moment, loop):
        if moment == "after_backward":
            for layer in loop.layers:
                rows, columns = layer.A.grad.any(1), layer.B.grad.any(0)
                assert int(rows.sum()) == r_hat and (loop.allocator.step == 0 or torch.equal(rows, columns))

    Loop(lambda *parts: RMLoRA(*parts, share=share), steps=6, look=look)


@pytest.mark.equation("rm-lora")
def test_rm_lora_without_mask_and_pull_is_lora_to_the_bit():
    lora = Loop(lambda model, optimizer, steps: FixedRanks(model, steps))
    same = Loop(lambda *parts: RMLoRA(*parts, beta=0, share=1.0))
    for a, b in zip(lora.layers, same.layers, strict=True):
        assert torch.equal(a.A, b.A) and torch.equal(a.B, b.B) and b.B.any()


@pytest.mark.equation("rm-lora")
@pytest.mark.parametrize("share", [0, 1.5])
def test_rm_lora_refuses_an_impossible_share(share):
    with pytest.raises(ValueError, match=rf"share must be in \(0, 1\], got {share}"):
        Loop(lambda *parts: RMLoRA(*parts, share=share), steps=0)


# What only installs something

D, M, LAYERS, WORDS = 8, 20, 2, 11
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])  # 1 is padding


def encoder(dropout=0.0):
    torch.manual_seed(0)
    config = TransformerConfig(WORDS, D, LAYERS, 2, M, 32, 2, hidden_dropout_prob=dropout, initializer_range=0.3)
    model = SequenceClassifier(TinyTransformer(config), 3).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)  # biases and LayerNorms are not at a special value
    return model


METHODS = ["adapter-h", "adapter-p", "prefix", "prompt", "bitfit", "ia3"]
COUNTS = {name: installed_parameters(name, 5, LAYERS, D, M) for name in METHODS}  # at size 5


def installed(name, size=5):
    model = encoder()
    PEERS[name].install(model, *([size] if PEERS[name].sized else []))
    return model.eval()


@pytest.mark.equation("adapters", "prefix", "bias")
@pytest.mark.parametrize("name", COUNTS)
def test_trained_parameters_are_as_many_as_the_closed_form_says(name):
    assert set(COUNTS) == {name for name, peer in PEERS.items() if peer.install}
    model = installed(name)
    assert sum(p.numel() for p in model.encoder.parameters() if p.requires_grad) == COUNTS[name]
    assert all(p.requires_grad for p in model.classifier.parameters())


@pytest.mark.equation("adapters", "prefix", "bias")
@pytest.mark.parametrize("name", COUNTS)
def test_what_starts_as_the_frozen_model_does_so_exactly_and_no_other(name):
    frozen, outputs = encoder()(IDS), installed(name)(IDS)
    if name in ("bitfit", "ia3"):
        assert torch.equal(outputs, frozen)
    elif name.startswith("adapter"):  # near the identity, as Houlsby says: two matrices of deviation .01
        assert not torch.equal(outputs, frozen) and (outputs - frozen).abs().max() < 0.02
    else:
        assert not torch.allclose(outputs, frozen, atol=1e-3)


@pytest.mark.equation("adapters")
def test_an_adapter_is_a_bottleneck_with_a_residual():
    torch.manual_seed(1)
    base = nn.Linear(6, 4)
    adapter = adapters.Adapter(base, 4, 3)
    for p in adapter.parameters():
        p.data.normal_()
    x = torch.randn(2, 5, 6)
    h = base(x)
    inner = h @ adapter.down.weight.T + adapter.down.bias  # (2, 5, 3)
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    assert torch.allclose(adapter(x), h + inner @ adapter.up.weight.T + adapter.up.bias, atol=1e-5)


@pytest.mark.equation("adapters")
def test_adapters_stand_where_their_papers_put_them():
    kinds = {}
    for name in ("adapter-h", "adapter-p"):
        modules = installed(name).named_modules()
        kinds[name] = {n: type(m.base) for n, m in modules if isinstance(m, adapters.Adapter)}
    blocks = [f"encoder.layers.{i}" for i in range(LAYERS)]
    assert kinds["adapter-h"] == {f"{b}.{part}": nn.Linear for b in blocks for part in ("out", "down")}
    assert kinds["adapter-p"] == {f"{b}.norm2": nn.LayerNorm for b in blocks}


@pytest.mark.equation("prefix")
@given(seeds)
def test_prefix_attention_is_a_mixture_of_attention_to_the_words_and_to_the_prefix(seed):
    """(1 - s) Attn(words) + s Attn(prefix), s the prefix's share of the softmax: head by head, padding left out."""
    g = generator(seed)
    model = installed("prefix", 3).double()
    block, plain = model.encoder.layers[0], encoder().double().encoder.layers[0]
    for p in (block.prefix_key, block.prefix_value):
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    x = torch.randn(2, 4, D, generator=g, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    heads = []
    q, k, v = (f(x).view(2, 4, 2, 4).transpose(1, 2) for f in (plain.query, plain.key, plain.value))
    for h in range(2):
        Pk, Pv = (p.detach()[:, 4 * h : 4 * h + 4] for p in (block.prefix_key, block.prefix_value))
        words = (q[:, h] @ k[:, h].mT / 2).masked_fill(~mask[:, None], float("-inf"))  # (2, 4, 4); sqrt(4) = 2
        own = q[:, h] @ Pk.T / 2  # (2, 4, 3)
        s = torch.sigmoid(own.logsumexp(-1) - words.logsumexp(-1))[..., None]
        heads.append((1 - s) * (words.softmax(-1) @ v[:, h]) + s * (own.softmax(-1) @ Pv))
    expected = plain.out(torch.cat(heads, -1))
    assert_close(block.attention(x, mask[:, None, None]), expected, 64)


@pytest.mark.equation("prefix")
def test_a_prompt_is_read_like_words_in_front_of_the_sentence():
    """Trained vectors that equal those of words give what these words give."""
    model, plain = installed("prompt", 2), encoder()
    words = torch.tensor([9, 4])
    model.encoder.word.prompt.data = plain.encoder.word.weight[words].clone()
    expected = plain.encoder(torch.cat([words.expand(2, -1), IDS], dim=1))[:, 2:]
    assert_close(model.encoder(IDS), expected, 64)
    assert_close(model.encoder(IDS, IDS != 1, torch.zeros_like(IDS)), expected, 64)
    assert model.encoder(IDS).shape == (2, 4, D)
    assert model.encoder.config.max_length == plain.encoder.config.max_length - 2


@pytest.mark.equation("bias")
def test_ia3_equals_rescaled_weights():
    model, plain = installed("ia3"), encoder()
    with torch.no_grad():
        for ours, theirs in zip(model.encoder.layers, plain.encoder.layers, strict=True):
            for name in ("key", "value", "down"):
                scale = getattr(ours, name).scale
                scale.copy_(torch.rand(scale.shape) + 0.5)
                target = getattr(theirs, name)
                target.weight *= scale if name == "down" else scale[:, None]
                target.bias *= 1 if name == "down" else scale
    assert torch.allclose(model(IDS), plain(IDS), atol=1e-5)


@pytest.mark.equation("bias")
def test_bitfit_trains_every_bias_and_nothing_else():
    trained = [n for n, p in installed("bitfit").encoder.named_parameters() if p.requires_grad]
    modules = ["query", "key", "value", "out", "up", "down", "norm1", "norm2"]
    expected = {f"layers.{i}.{name}.bias" for i in range(LAYERS) for name in modules} | {"norm.bias"}
    assert set(trained) == expected and len(trained) == len(expected)


@pytest.mark.equation("adapters", "prefix", "bias")
@pytest.mark.parametrize("name", COUNTS)
def test_everything_that_is_installed_gets_a_gradient(name):
    model = installed(name)
    if name == "adapter-h":
        for p in model.encoder.parameters():
            p.data += 0.01  # LayerNorms and zero biases too
    model(IDS).square().sum().backward()
    for n, p in model.named_parameters():
        if p.requires_grad and not n.endswith("key.bias"):  # a key's bias moves all scores of a row alike
            assert p.grad is not None and p.grad.any(), n
