"""What the papers of the compared methods state, method by method. How they run in the main job: test_program.py."""

import copy
import itertools
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import parts_of_steps
from strategies import assert_close, generator, installed_parameters, row, seeds
from test_tiny_transformer import small_encoder
from torch import nn

from budget import kept_density
from hard_concrete import HardConcreteGate
from hub.adapters import save_adapter
from hub.peft import export_peft
from peers import METHODS, TARGETS, adalora, adapters, allocator_for, alora, install, made_plain, rm_lora, sora
from peers.adalora import AdaLoRA, budget_at, mean_norm
from peers.allocator import Allocator
from peers.alora import ALoRA, hold_out
from peers.fixed_ranks import FixedRanks
from peers.nf4 import quantize_linears
from peers.rm_lora import RMLoRA
from peers.sora import SoRA, lambda_at, shrink, soft_threshold
from rank_allocator import RankAllocator
from salora import adapt, merge, orthogonality, salora_layers
from tiny_transformer import SequenceClassifier

pytestmark = pytest.mark.equation("peers")

# A small net with triplets, and a loop around it


def net():
    torch.manual_seed(0)
    return adapt(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)), ["0", "2"], 4, 8)


def double_net():
    return net().double()


class Spared(nn.Module):
    """A layer that no forward pass uses, beside a net."""

    def __init__(self):
        super().__init__()
        self.spare, self.net = nn.Linear(6, 12), nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))

    def forward(self, x):
        return self.net(x)


def net_with_a_spare_layer():
    torch.manual_seed(0)
    return adapt(Spared(), ["spare", "0", "2"], 4, 8)


INPUTS, LABELS = torch.randn(64, 6, generator=generator(1)), torch.arange(64) % 3


def loss_of(model):
    return nn.functional.cross_entropy(model(INPUTS.to(next(model.parameters()).dtype)), LABELS)


class Loop:
    """Trains the small net with a peer. Iterating over it does so, and stops after each part of every step."""

    def __init__(self, make, steps=40, Optimizer=torch.optim.AdamW, build=net):
        self.model, self.steps = build(), steps
        self.optimizer = Optimizer([p for p in self.model.parameters() if p.requires_grad], lr=0.02)
        self.allocator = make(self.model, self.optimizer, steps)
        self.layers = list(self.allocator.layers.values())

    def __iter__(self):
        return parts_of_steps(self, loss_of)

    def train(self):
        for _ in self:
            pass
        return self


def scored(Peer):
    """ALoRA with the loss on the training rows as its score; other peers as they are."""

    def make(model, optimizer, steps, **options):
        options |= {"score": lambda: -loss_of(model).item()} if Peer is ALoRA else {}
        return Peer(model, optimizer, steps, **options)

    return make


ALLOCATING = {name: scored(m.allocator) for name, m in METHODS.items() if issubclass(m.allocator, Allocator)}
everyone = pytest.mark.parametrize("make", ALLOCATING.values(), ids=ALLOCATING)

# All that allocate


@everyone
def test_a_peer_starts_as_the_frozen_model_and_finishes_as_plain_lora_with_the_same_outputs(make, tmp_path):
    loop = Loop(make)
    outputs = [loop.model(INPUTS).detach() for when in loop if when == "before_step"]
    frozen, expected = merge(net())(INPUTS), loop.model.eval()(INPUTS)
    assert torch.equal(outputs[0], frozen) and not torch.allclose(outputs[-1], frozen, atol=1e-3)
    with pytest.raises(ValueError, match="still at work on 0: call its finish"):
        save_adapter(loop.model, tmp_path / "adapter.pt")
    loop.allocator.finish()
    assert_close(loop.model(INPUTS), expected, 16)
    for layer in loop.layers:
        assert type(layer.gate) is HardConcreteGate and torch.equal(layer.gate.fixed, torch.ones(layer.r))
    assert loop.allocator.C_end == kept_density(loop.layers)
    save_adapter(loop.model, tmp_path / "adapter.pt")
    export_peft(loop.model, tmp_path / "peft")
    assert_close(merge(loop.model)(INPUTS), expected, 16)


@pytest.mark.parametrize("name", ALLOCATING)
def test_a_step_out_of_order_a_model_without_adapters_and_impossible_shares_are_refused(name):
    make, loop = ALLOCATING[name], Loop(FixedRanks)
    allocator = make(net(), loop.optimizer, 5)
    with pytest.raises(RuntimeError, match=r"before_step\(1\) where step 0 is due"):
        allocator.before_step(1)
    with pytest.raises(RuntimeError, match=r"finish\(\) after 0 of 5 steps"):
        allocator.finish()
    with pytest.raises(ValueError, match="no adapters: call adapt"):
        make(nn.Linear(2, 2), loop.optimizer, 5)
    share = {"rm-lora": "share", "adalora": "budget", "alora": "budget"}.get(name)
    for value in (0, 1.5) if share else ():
        with row(value), pytest.raises(ValueError, match=rf"{share} must be in \(0, 1\], got {value}"):
            make(net(), loop.optimizer, 5, **{share: value})


@everyone
@pytest.mark.parametrize("stop", [15, 25])
def test_a_peer_resumed_goes_on_equal_to_the_bit(make, stop):
    whole, half, rest = Loop(make).train(), Loop(make), Loop(make)
    for when in half:
        if when == "after_step" and half.allocator.step == stop:
            break
    for part in ("model", "optimizer", "allocator"):
        getattr(rest, part).load_state_dict(copy.deepcopy(getattr(half, part).state_dict()))
    after = rest.train().model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in whole.model.state_dict().items())


@everyone
def test_what_a_peer_draws_is_decided_by_its_seed_and_by_nothing_else(make):
    def trained(seed, drawn_before=0):
        loop = Loop(lambda *parts: make(*parts, seed=seed))
        torch.randn(drawn_before)
        return torch.cat([p.detach().flatten() for p in loop.train().model.parameters()])

    assert torch.equal(trained(1), trained(1, drawn_before=3)) and not torch.equal(trained(1), trained(2))


PULLS = {
    "adalora": (AdaLoRA, adalora.GAMMA, mean_norm),
    "adalora, Eq. (4)": (lambda *parts: AdaLoRA(*parts, regularizer=orthogonality), adalora.GAMMA, orthogonality),
    "rm-lora": (RMLoRA, rm_lora.BETA, orthogonality),
}


@pytest.mark.parametrize("make,weight,pull_of", PULLS.values(), ids=PULLS)
def test_the_orthogonality_of_b_and_a_is_part_of_the_gradient(make, weight, pull_of):
    """The only part here, where that of the loss is zeroed."""
    loop = Loop(make, steps=3)
    for when in loop:
        if when == "backward":
            loop.optimizer.zero_grad(set_to_none=False)
        if when == "after_backward":
            factors = [p for layer in loop.layers for p in (layer.A, layer.B)]
            pulls = torch.autograd.grad(weight * pull_of(loop.allocator.layers), factors)
            for p, pull in zip(factors, pulls, strict=True):
                moved = p.grad != 0  # RM-LoRA masks the rest
                assert torch.equal(p.grad[moved], pull[moved]) and (moved.any() or not pull.any())


WITH_A_SPARE = {**ALLOCATING, "rm-lora without pull": lambda *parts: RMLoRA(*parts, beta=0), "salora": RankAllocator}


@pytest.mark.filterwarnings("ignore:no gradient has reached spare")  # what an allocator says of it
@pytest.mark.parametrize("make", WITH_A_SPARE.values(), ids=WITH_A_SPARE)
def test_a_layer_that_no_gradient_reaches_does_not_matter_and_stops_nothing(make):
    """One expert of many, for instance, that no row was sent to."""
    loop = Loop(make, build=net_with_a_spare_layer)
    spare, *used = loop.layers
    for when in loop:
        if when == "backward":
            assert spare.B.grad is None and all(layer.B.grad is not None for layer in used)
    if isinstance(loop.allocator, AdaLoRA):
        assert not loop.allocator.sensitivity[0].any(), "that of its singular values"
    outputs = loop.model.eval()(INPUTS).detach()
    loop.allocator.finish()
    assert_close(merge(loop.model)(INPUTS), outputs, 16)
    assert loss_of(loop.model) < loss_of(net_with_a_spare_layer()) - 0.05 and max(layer.r for layer in used) > 0


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


T, T_I, T_F = 30, 2, 12  # of the comparisons below


def short_adalora(*parts, interval):
    allocator = AdaLoRA(*parts, budget=0.25, interval=interval)
    allocator.t_i, allocator.t_f = T_I, T_F
    return allocator


def triplets_of(loop):
    """E (r, 1), A and B of every layer, as the authors call them."""
    return [(layer.gate.log_theta.detach()[:, None], layer.A.detach(), layer.B.detach()) for layer in loop.layers]


def assert_same_path(ours, theirs):
    """The same singular values are 0, and all else agrees up to rounding."""
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine[0] == 0, other[0] == 0)
        for a, b in zip(mine, other, strict=True):
            assert_close(a, b.detach(), 64)


class WithLoss(nn.Module):
    """A net that returns its loss the way models of transformers do: PEFT adds its regularizer there."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self):
        return SimpleNamespace(loss=loss_of(self.net))


@pytest.mark.equation("adalora")
def test_adalora_goes_step_by_step_where_peft_goes():
    """Importances, masks and weights, through PEFT's own forward and update_and_allocate. They allocate at T - t_f
    whether it is due or not: here it is."""
    peft = pytest.importorskip("peft")
    loop, masked = Loop(lambda *parts: short_adalora(*parts, interval=3), T, build=double_net), []
    plan = dict(init_r=4, target_r=1, tinit=T_I, tfinal=T_F, deltaT=3, total_step=T, orth_reg_weight=0.1)
    config = peft.AdaLoraConfig(**plan, lora_alpha=8, target_modules=["0", "2"])
    theirs = peft.get_peft_model(WithLoss(merge(net())), config).double()
    oracle, adapters = theirs.base_model, [theirs.base_model.model.net[i] for i in (0, 2)]
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    parts = [[adapter.get_parameter(f"lora_{kind}.default") for kind in "EAB"] for adapter in adapters]
    for adapter in adapters:
        adapter.scaling["default"] *= (4 + 1e-5) / 4  # their forward divides by the rank plus 1e-5

    for when in loop:
        t = loop.allocator.step - 1  # theirs: after_step has counted this step already
        if when == "before_step" and t == -1:
            for own, other in zip(triplets_of(loop), parts, strict=True):
                for p, q in zip(own, other, strict=True):
                    q.data.copy_(p)
        if when == "after_step":
            oracle().loss.backward()
            optimizer.step()
            oracle.update_and_allocate(t)
            optimizer.zero_grad()
            assert_same_path(triplets_of(loop), parts)
            if t < T - T_F:  # they forget them then
                for i, s in zip((0, 2), loop.allocator.importance(), strict=True):
                    name = f"net.{i}.lora_%s.default"
                    E, A, B = (oracle.rankallocator._element_score(name % kind) for kind in "EAB")
                    assert torch.allclose(E[:, 0] + A.mean(1) + B.mean(0), s, rtol=1e-9, atol=0)
            if not all(E.all() for E, _, _ in parts):
                masked.append(t)
    assert masked == [3, 6, 9, 12, 15, 18, *range(19, 30)]


@pytest.mark.equation("adalora")
def test_adalora_goes_step_by_step_where_the_authors_trainer_goes():
    """Backward, the optimizer, then importances of the new weights and the old gradients, then the mask."""
    loop, masked = Loop(lambda *parts: short_adalora(*parts, interval=4), T, build=double_net), []
    noise, base = generator(0), merge(double_net())
    x = INPUTS.double()
    end = T - T_F
    for when in loop:
        t = loop.allocator.step - 1
        if when == "before_step" and t == -1:
            parts = []
            for layer in loop.layers:
                A, B = (0.02 * torch.randn(p.shape, generator=noise).double() for p in (layer.A, layer.B))
                parts += [nn.Parameter(p) for p in (torch.zeros_like(A[:, :1]), A, B)]
            optimizer = torch.optim.AdamW(parts, lr=0.02)
            average, uncertainty = ([torch.zeros_like(p) for p in parts] for _ in range(2))
        if when != "after_step":
            continue
        E1, A1, B1, E2, A2, B2 = parts
        h = torch.tanh(base[0](x) + 2 * x @ (A1 * E1).T @ B1.T)
        loss = nn.functional.cross_entropy(base[2](h) + 2 * h @ (A2 * E2).T @ B2.T, LABELS)
        grams = [A1 @ A1.T, B1.T @ B1, A2 @ A2.T, B2.T @ B2]
        pull = sum(torch.linalg.matrix_norm(gram - torch.eye(4, dtype=gram.dtype)) for gram in grams)
        (loss + 0.1 * pull / 4).backward()
        optimizer.step()
        if t < end:
            for i, p in enumerate(parts):
                sensitivity = (p * p.grad).abs().detach()
                average[i] = 0.85 * average[i] + 0.15 * sensitivity
                uncertainty[i] = 0.85 * uncertainty[i] + 0.15 * (sensitivity - average[i]).abs()
        s = [a * u for a, u in zip(average, uncertainty, strict=True)]
        scores = torch.cat([s[i][:, 0] + s[i + 1].mean(1) + s[i + 2].mean(0) for i in (0, 3)])
        assert torch.allclose(torch.cat(loop.allocator.importance()), scores, rtol=1e-9, atol=0)
        b = 8 if t <= T_I else 2 if t > end else int(2 + 6 * (1 - (t - T_I) / (end - T_I)) ** 3)
        if t > end or (t > T_I and t % 4 == 0):
            closed = scores <= scores.kthvalue(8 - b).values
            for E, mask in zip((E1, E2), closed.split(4), strict=True):
                E.data[mask] = 0
            masked.append((t, b))
        optimizer.zero_grad()
        assert_same_path(triplets_of(loop), (parts[:3], parts[3:]))
    assert masked == [(4, 6), (8, 3), (12, 2), (16, 2), *((t, 2) for t in range(19, 30))]


@pytest.mark.equation("adalora")
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("budget,last", [(0.25, 2), (1.0, 8)])
def test_adalora_keeps_its_budget_in_the_shortest_run(steps, budget, last):
    """The authors' trainer counts from 0, so that with t_f = 1 the last mask would never come."""
    loop = Loop(lambda *parts: AdaLoRA(*parts, budget=budget), steps).train()
    assert sum(int(mask.sum()) for mask in loop.allocator.masks()) == last


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


def three_lines(g, xi):
    """What the authors' optimizer does to a gate after its step."""
    if g > xi:
        g -= xi
    if g < -xi:
        g += xi
    return 0.0 if abs(g) < xi else g


@pytest.mark.equation("sora")
@given(st.floats(-3, 3), st.floats(0, 2))
def test_sora_shrinks_as_its_authors_do_so_that_no_gate_below_twice_the_threshold_stays(g, xi):
    left = shrink(torch.tensor([g], dtype=torch.float64), xi).item()
    if abs(g) != xi:  # they leave that one number as it is
        assert left == three_lines(g, xi)
    assert left == 0 if abs(g) < 2 * xi else abs(left) >= xi


@pytest.mark.equation("sora")
def test_sora_lambda_rises_in_seven_levels_from_zero_the_first_the_longest():
    values = [lambda_at(step, 1400) for step in range(1400)]
    assert values[0] == 0 and values[-1] == sora.LAMBDA and values == sorted(values)
    levels = list(dict.fromkeys(values))
    assert [values.count(value) for value in levels] == [500, *6 * [150]]
    assert [b - a for a, b in itertools.pairwise(levels)] == pytest.approx([sora.LAMBDA / 6] * 6)


@pytest.mark.equation("sora")
@pytest.mark.parametrize("times_lr", [False, True])
def test_sora_goes_step_by_step_where_its_authors_trainer_goes_and_prunes_zeros_in_the_end(times_lr):
    """The loss with 1e-3 mean |g|; Adam without decay for g, written out; then the three lines, number by number."""
    steps, lr = 56, 0.02
    highest = 0.05 / lr if times_lr else 0.05
    lambdas = [0.0] * 20 + [level / 6 * highest for level in range(1, 7) for _ in range(6)]
    make = lambda *parts: SoRA(*parts, sparse_lambda=highest, times_lr=times_lr)  # noqa: E731
    tiny = partial(torch.optim.AdamW, eps=1e-15)  # its eps stands elsewhere in their formula
    loop, base, x = Loop(make, steps, tiny, double_net), merge(double_net()), INPUTS.double()
    for when in loop:
        step = loop.allocator.step
        if when == "before_step" and step == 0:
            noise = generator(0)
            gates = [torch.randn(4, generator=noise).double() for _ in loop.layers]
            factors = [nn.Parameter(p.detach().clone()) for layer in loop.layers for p in (layer.A, layer.B)]
            optimizer = tiny(factors, lr=lr)
            m, v = ([torch.zeros(4, dtype=x.dtype) for _ in gates] for _ in range(2))
        if when != "after_step":
            continue
        A1, B1, A2, B2 = factors
        g1, g2 = (g.requires_grad_(True) for g in gates)
        h = torch.tanh(base[0](x) + ((x @ A1.T) * g1) @ B1.T * 2)
        loss = nn.functional.cross_entropy(base[2](h) + ((h @ A2.T) * g2) @ B2.T * 2, LABELS)
        (loss + 1e-3 * (g1.abs().sum() + g2.abs().sum()) / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
        for i, g in enumerate(gates):
            m[i] = 0.9 * m[i] + 0.1 * g.grad
            v[i] = 0.999 * v[i] + 0.001 * g.grad**2
            size = lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            moved = g.detach() - size * m[i] / v[i].sqrt()
            xi = lambdas[step - 1] * lr if times_lr else lambdas[step - 1]
            gates[i] = torch.tensor([three_lines(value, xi) for value in moved.tolist()], dtype=x.dtype)
        assert loop.allocator.status()["lam"] == pytest.approx(lambdas[step - 1])
        for layer, g, A, B in zip(loop.layers, gates, factors[0::2], factors[1::2], strict=True):
            assert torch.equal(g == 0, layer.gate.log_theta == 0)
            for own, other in ((layer.gate.log_theta, g), (layer.A, A), (layer.B, B)):
                assert_close(own.detach(), other.detach(), 1000)  # Adam magnifies rounding of small gradients
    nonzero = [int(g.count_nonzero()) for g in gates]
    assert 0 < sum(nonzero) < 8 and loop.allocator.status()["triplets"] == f"{sum(nonzero)}/8"
    loop.allocator.finish()
    assert [layer.r for layer in loop.layers] == nonzero


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
    loop = Loop(without_moves, steps=5).train()
    before = copy.deepcopy(loop.model.state_dict())
    scores = loop.allocator.importance()
    after = loop.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "scoring changes nothing"
    open_ranks = {(i, j) for i, layer in enumerate(loop.layers) for j in range(4) if layer.gate.fixed[j]}
    assert set(scores) == open_ranks and len(open_ranks) == 4
    for rank in open_ranks:
        whole = -ablated(loop.model, lambda i, j: True)
        without = -ablated(loop.model, lambda i, j: (i, j) != rank)
        alone = -ablated(loop.model, lambda i, j: (i, j) == rank)
        assert scores[rank] == pytest.approx(whole - without + alone, abs=1e-5), "Eq. (6)"


def open_counts(loop):
    return [int(layer.gate.fixed.sum()) for layer in loop.layers]


@pytest.mark.equation("alora")
@pytest.mark.parametrize("budget,total", [(0.25, 2), (0.75, 6), (1.0, 8)])
def test_alora_conserves_its_budget_at_every_move(budget, total):
    loop = Loop(lambda *parts: scored(ALoRA)(*parts, budget=budget))
    counts = [open_counts(loop) for when in loop if when == "before_step"]
    assert loop.allocator.moves == {8, 10, 11, 12, 14, 16, 17, 18} and len(counts) == 40
    assert all(sum(now) == total for now in counts)
    assert max(counts[0]) - min(counts[0]) <= 1, "the same for all at first"
    assert any(now != counts[0] for now in counts) == (budget < 1), "where there is room, ranks move"


@pytest.mark.equation("alora")
@given(st.data())
def test_alora_closes_the_worst_and_opens_where_none_was_closed(data):
    """For any scores and any open ranks: as many opened as closed, in the most important matrices with room."""
    loop = Loop(scored(ALoRA))
    masks = [data.draw(st.lists(st.booleans(), min_size=4, max_size=4)) for _ in loop.layers]
    for layer, mask in zip(loop.layers, masks, strict=True):
        layer.gate.fix(torch.tensor(mask).float())
    ranks = [(i, j) for i, mask in enumerate(masks) for j, on in enumerate(mask) if on]
    scores = {rank: data.draw(st.floats(-5, 5)) for rank in ranks}
    close, receivers = loop.allocator.choose(scores)
    assert len(close) == len(receivers) <= max(1, round(alora.CLOSED * len(ranks)))
    losers = {i for i, _ in close}
    assert not losers & set(receivers)
    assert all(receivers.count(i) <= masks[i].count(False) for i in receivers)
    assert all(scores[rank] <= min((scores[r] for r in ranks if r not in close), default=9) for rank in close)
    if ranks and not close:
        worst = min(scores, key=scores.get)[0]
        assert all(all(mask) for i, mask in enumerate(masks) if i != worst), "nothing moves only where there is no room"


@pytest.mark.equation("alora")
@pytest.mark.parametrize("budget,n", [(0.02, 1), (0.25, 1), (0.45, 2), (0.7, 3)])
def test_alora_moves_a_thirty_second_of_its_open_ranks_at_a_time_rounded(budget, n):
    model = adapt(nn.Sequential(*(nn.Linear(8, 8) for _ in range(16))), [r"\d+"], 8, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    allocator = ALoRA(model, optimizer, 40, lambda: 0.0, budget=budget)
    allocator.before_step(0)
    close, receivers = allocator.choose(allocator.importance())
    assert len(close) == len(receivers) == n, f"of {int(128 * budget)} open ranks"


@pytest.mark.equation("alora")
@given(st.dictionaries(st.integers(0, 9), st.integers(0, 5), min_size=1), st.data())
def test_alora_gives_ranks_in_turn_and_the_most_important_matrices_come_first(room, data):
    """A matrix of which no rank is open has no importance, and comes last."""
    importance = st.floats(-5, 5)
    means = {i: data.draw(importance) for i in room if data.draw(st.booleans())}
    n = data.draw(st.integers(0, sum(room.values())))
    given_to = alora.share_out(n, room, means)
    counts = {i: given_to.count(i) for i in room}
    assert len(given_to) == n and all(counts[i] <= room[i] for i in room)
    for i, j in itertools.permutations(room, 2):
        if counts[i] < room[i]:
            assert counts[j] <= counts[i] + 1, "one for each in turn"
            if means.get(i, -9) > means.get(j, -9):
                assert counts[j] <= counts[i]


@pytest.mark.equation("alora")
def test_alora_opens_ranks_afresh_so_that_opening_changes_no_output():
    loop = Loop(without_moves, steps=7).train()
    layer = loop.layers[0]
    layer.B.data[:, 2:] = 5.0  # of a closed rank: what it was, nobody sees
    moments = [loop.optimizer.state[p][name] for p in (layer.A, layer.B) for name in ("exp_avg", "exp_avg_sq")]
    for moment in moments:  # as if all ranks of the layer had been open before
        moment.fill_(1.0)
    loop.allocator.choose = lambda scores: ([(1, 0)], [0])
    closed, old_A = copy.deepcopy(loop.model), layer.A.clone()
    noise = torch.Generator().set_state(loop.allocator.noise.get_state())
    loop.allocator.move()
    assert_close(layer.A[2], torch.randn(6, generator=noise) / 6**0.5)  # N(0, 1 / k), as in a fresh layer
    assert open_counts(loop) == [3, 1]
    list(salora_layers(closed).values())[1].gate.fixed[0] = 0
    assert torch.equal(loop.model(INPUTS), closed(INPUTS)), "only what was closed is missing"
    assert not layer.B[:, 2].any() and (layer.A == old_A).all(1).tolist() == [True, True, False, True]
    for moment, axis in zip(moments, (1, 1, 0, 0), strict=True):
        assert moment.any(axis).tolist() == [True, True, False, True], "what opens has no moments"


@pytest.mark.equation("alora")
@given(st.integers(2, 200), st.integers(1, 40))
def test_alora_scores_on_rows_that_it_does_not_train_on(n, batch):
    train, held_out = hold_out(list(range(n)), batch)
    assert train + held_out == list(range(n)) and 1 <= len(held_out) <= max(1, min(batch, n // 8))
    with pytest.raises(ValueError, match="one row to train on and another to score ranks on, got 1"):
        hold_out([0], batch)


# RM-LoRA


def directions(loop, layer):
    """A and B of a layer, and their moments, each as a tensor of r rows."""
    found = []
    for p in (layer.A, layer.B):
        tensors = [p, *(m for m in loop.optimizer.state.get(p, {}).values() if m is not None and m.dim())]
        found += [(t.T if p is layer.B else t).detach().clone() for t in tensors]
    return found


@pytest.mark.equation("rm-lora")
@pytest.mark.parametrize("Optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("share,r_hat", [(0.25, 1), (0.5, 2), (0.7, 3), (1.0, 4)])
def test_rm_lora_changes_exactly_r_hat_rows_of_a_and_columns_of_b_a_step(Optimizer, share, r_hat):
    loop, chosen = Loop(lambda *parts: RMLoRA(*parts, share=share), 30, Optimizer), set()
    for when in loop:
        if when == "before_step":
            before = [directions(loop, layer) for layer in loop.layers]
        if when == "after_backward":  # so that a clipping of gradients sees only what is updated
            assert all(int(layer.B.grad.any(0).sum()) == r_hat for layer in loop.layers)
        if when == "after_step" and loop.allocator.step > 1:  # at the first there are no moments yet, and B = 0
            for layer, old in zip(loop.layers, before, strict=True):
                changed = {tuple((a != b).any(1).tolist()) for a, b in zip(old, directions(loop, layer), strict=True)}
                assert len(changed) == 1, "A, B and the moments of both"
                chosen |= changed
    assert chosen == {tuple(i in rows for i in range(4)) for rows in itertools.combinations(range(4), r_hat)}


@pytest.mark.equation("rm-lora")
def test_rm_lora_without_mask_and_pull_is_lora_to_the_bit():
    lora = Loop(FixedRanks).train()
    same = Loop(lambda *parts: RMLoRA(*parts, beta=0, share=1.0)).train()
    for a, b in zip(lora.layers, same.layers, strict=True):
        assert torch.equal(a.A, b.A) and torch.equal(a.B, b.B) and b.B.any()


# What only installs something

D, M, LAYERS, HEADS = 12, 20, 2, 3  # of small_encoder
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])  # 1 is padding


def encoder():
    return SequenceClassifier(small_encoder(), 3).eval()


INSTALLED = ["adapter-h", "adapter-p", "prefix", "prompt", "bitfit", "ia3", "mam", "propelt-adapter", "propelt-prefix",
             "propelt-lora"]  # fmt: skip


def installed(name, size=5):
    model = encoder()
    install(model, name, size)
    return model.eval()


def encoder_in_4_bits():
    model = encoder()
    return made_plain(quantize_linears(model, TARGETS))


@pytest.mark.equation("peers", "adapters", "prefix", "bias")
@pytest.mark.parametrize("name", METHODS)
def test_a_method_starts_as_its_paper_says_trains_what_the_closed_form_counts_and_has_all_hooks(name):
    model, frozen = installed(name), encoder()(IDS)
    outputs = model(IDS)
    if name == "qlora":
        assert torch.allclose(outputs, encoder_in_4_bits()(IDS), atol=1e-6)
    elif name in ("prefix", "prompt", "mam", "propelt-prefix"):
        assert not torch.allclose(outputs, frozen, atol=1e-3)
    elif "adapter" in name:  # near the identity, as Houlsby says: two matrices of deviation .01
        assert not torch.equal(outputs, frozen) and (outputs - frozen).abs().max() < 0.02
    else:
        assert torch.equal(outputs, frozen)

    whole = sum(p.numel() for p in encoder().encoder.parameters())
    triplets = LAYERS * 5 * (4 * 2 * D + 2 * (D + M))
    counts = {"head": 0, "full": whole, "child-tuning": whole}
    counts |= {name: installed_parameters(name, 5, LAYERS, D, M) for name in INSTALLED}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for n, p in trained.items() if n.startswith("encoder")) == counts.get(name, triplets)
    assert METHODS[name].low_rank == (name not in counts)
    assert all(p.requires_grad for p in model.classifier.parameters())
    assert name != "bitfit" or all(n.endswith("bias") for n in trained if n.startswith("encoder"))

    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    loss = lambda: model(IDS).square().sum()  # noqa: E731
    score = (lambda: -loss().item()) if name == "alora" else None
    losses = (lambda: [loss()]) if name == "child-tuning" else None
    allocator = allocator_for(name, model.train(), optimizer, 3, score=score, losses=losses, warmup=0.5)
    before, rates = {n: p.detach().clone() for n, p in trained.items()}, []
    for step in range(3):
        allocator.before_step(step)
        model(IDS).square().sum().backward()
        allocator.after_backward()
        rates.append(allocator.lr_factor(step))
        optimizer.step()
        allocator.after_step()
        optimizer.zero_grad()
    moved = [p.shape != before[n].shape or not torch.equal(p, before[n]) for n, p in trained.items() if p.numel()]
    assert any(moved) and (all(moved) or name == "child-tuning"), "which may choose nothing of a small tensor"
    allocator.finish()
    assert not any(layer.allocating for layer in salora_layers(model).values())
    assert (rates == pytest.approx([1 / 2.5, 2 / 3 * 2 / 2.5, 1 / 3])) == (name != "salora"), "whose recipe decides"


@pytest.mark.parametrize("name", METHODS)
def test_dropout_in_the_attention_acts_in_train_mode_alone(name):
    model = encoder()
    for block in model.encoder.layers:
        block.attention_dropout = 0.5
    install(model, name, 5)
    assert torch.equal(model.eval()(IDS), model(IDS)) and not torch.equal(model.train()(IDS), model(IDS))


@pytest.mark.equation("adapters")
def test_an_adapter_is_a_bottleneck_with_a_residual():
    base, x = nn.Linear(6, 4), torch.randn(2, 5, 6)
    adapter = adapters.Adapter(base, 4, 3, dropout=nn.Hardtanh())  # something that is to be seen in eval mode, too
    for p in adapter.parameters():
        p.data.normal_()
    h = base(x).clamp(-1, 1)
    inner = h @ adapter.down.weight.T + adapter.down.bias  # (2, 5, 3)
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    assert torch.allclose(adapter(x), h + inner @ adapter.up.weight.T + adapter.up.bias, atol=1e-5)


@pytest.mark.equation("adapters")
def test_adapters_stand_where_their_papers_put_them():
    for name, parts in (("adapter-h", ("out", "down")), ("adapter-p", ("norm2",))):
        found = {n for n, m in installed(name).named_modules() if isinstance(m, adapters.Adapter)}
        assert found == {f"encoder.layers.{i}.{part}" for i in range(LAYERS) for part in parts}


@pytest.mark.equation("adapters")
def test_houlsbys_adapters_come_after_the_dropout_and_nothing_comes_between_them_and_the_residual():
    """Where dropout zeroes everything, what an adapter makes of zeros is still there."""
    model, x = installed("adapter-h").train(), torch.randn(2, 4, D)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0
        if isinstance(module, adapters.Adapter):
            module.up.bias.data.normal_()
    block = model.encoder.layers[0]
    expected = block.norm2(block.norm1(x + block.out.up.bias) + block.down.up.bias)
    assert_close(block(x, None), expected, 64)


@pytest.mark.equation("prefix")
@settings(max_examples=5)
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
    q, k, v = (f(x).view(2, 4, HEADS, 4).transpose(1, 2) for f in (plain.query, plain.key, plain.value))
    for h in range(HEADS):
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
