"""The main job's training loop around a small net is Algorithm 1."""

import copy

import pytest
import torch
from torch import nn

from budget import expected_density, kept_density, total_parameters
from cli.afterwards import predict
from peers.fixed_ranks import FixedRanks
from rank_allocator import RankAllocator, Recipe
from salora import adapt, orthogonality, salora_layers
from train_glue_mini import fine_tune, task_loss

pytestmark = pytest.mark.equation("alg 1")


def batch_of_rows(rows, model=None, device=None):
    return (torch.stack([x for _, x, _ in rows]),), torch.tensor([y for _, _, y in rows])


PAPER = dict(rule="budget", survivors="one", beta=0.05)


class Loop:
    """Runs `fine_tune` on a small net and calls `look(step, loop)` before every step of the optimizer."""

    def __init__(self, look, lr=2e-3, steps=40, accumulate=1, budget=0.5, **changes):
        self.recipe = Recipe.paper_scaled(**{**PAPER, **changes})
        torch.manual_seed(0)
        self.model = adapt(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2)), ["0", "2"], 4, 8).eval()
        self.layers = list(salora_layers(self.model).values())
        frozen = {n: p.clone() for n, p in self.model.named_parameters() if ".base." in n}
        inputs = torch.randn(45, 6)
        rows = [([0] * (i % 3), x, int(x[0] + x[1] > 0)) for i, x in enumerate(inputs)]
        self.step, self.seen = 0, []
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        self.allocator = RankAllocator(self.model, self.optimizer, steps, budget, self.recipe)

        def note(rows, model, device):
            self.seen.append((rows, torch.cat([layer.gate().detach() for layer in self.layers])))
            return batch_of_rows(rows)

        def before_step(optimizer, *rest):
            look(self.step, self)
            self.step, self.seen = self.step + 1, []

        self.optimizer.register_step_pre_hook(before_step)
        journal = fine_tune(self.model, rows, self.optimizer, self.allocator, lr=lr, batch_size=10,
                            accumulate=accumulate, batch_of=note)  # fmt: skip
        self.log, self.C_end = journal.rows, self.allocator.C_end
        assert self.step == steps
        after = dict(self.model.named_parameters())
        assert frozen and all(torch.equal(p, after[n]) for n, p in frozen.items()), "W never changes"


@pytest.mark.equation("alg 1", "12", "9", "noise")
def test_gradients_of_the_main_loop_are_those_of_alg_1_with_one_mask_per_step():
    """Those of every step, in micro-batches, equal autograd's on the whole batch at once: Eqs. (5), (9), (12)."""
    states, noise = [], []

    def look(step, loop):
        gates = [g for _, g in loop.seen]
        assert len(gates) == min(3, sum(len(rows) for rows, _ in loop.seen))
        assert all(torch.equal(gates[0], other) for other in gates), f"step {step}: one mask for all micro-batches"
        twin = copy.deepcopy(loop.model).train()
        layers = list(salora_layers(twin).values())
        twin.zero_grad()
        (x,), labels = batch_of_rows([row for part, _ in loop.seen for row in part])
        loss = nn.functional.cross_entropy(twin(x), labels) + loop.recipe.beta * orthogonality(layers)
        states.append(layers[0].gate.state)
        if states[-1] == "free":
            noise.extend(layer.gate.u.tolist() for layer in layers)
            C, lam = expected_density(layers), loop.allocator.lagrangian.lam.detach()
            loss = loss + lam[0] * (C - 0.5) ** 2
        loss.backward()
        for (name, p), q in zip(loop.model.named_parameters(), twin.parameters(), strict=True):
            grad = loop.allocator.gate_gradients.get(p, p.grad)  # that of log_theta is the allocator's own
            assert (grad is None) == (q.grad is None), f"step {step}: {name}"
            assert q.grad is None or torch.allclose(grad, q.grad, atol=1e-6), f"step {step}: {name}"

    Loop(look, accumulate=3)
    assert states == ["held"] * 8 + ["free"] * 12 + ["fixed"] * 20
    assert len(set(map(tuple, noise))) == len(noise) == 2 * 12, "noise of its own for every layer and step"


@pytest.mark.equation("noise")
def test_the_seed_of_an_allocator_decides_its_noise():
    drawn = []
    for seed in (1, 1, 2):
        model = adapt(nn.Sequential(nn.Linear(6, 2)), ["0"], r=4)
        optimizer = torch.optim.SGD([model[0].A, model[0].B], lr=0.1)
        RankAllocator(model, optimizer, 3, recipe=Recipe(window=(0, 1)), seed=seed).before_step(0)
        drawn.append(model[0].gate.u.tolist())
    assert drawn[0] == drawn[1] != drawn[2] and not set(drawn[1]) & set(drawn[2])


def test_every_epoch_of_every_seed_has_its_own_order_and_dropout():
    """The second epoch of seed 0 is not the first of seed 1."""
    orders, dropouts = [], []
    rows = [([0], torch.randn(6), i) for i in range(20)]

    def note(part, model, device):
        orders.extend(i for *_, i in part)
        dropouts.append(torch.initial_seed())
        return (torch.stack([x for _, x, _ in part]),), torch.zeros(len(part), dtype=torch.long)

    for seed in range(3):
        model = adapt(nn.Sequential(nn.Linear(6, 2)), ["0"], 1, 8)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
        allocator = FixedRanks(model, optimizer, 6)
        fine_tune(model, rows, optimizer, allocator, lr=0.1, batch_size=10, seed=seed, batch_of=note)
    assert len({tuple(orders[i : i + 20]) for i in range(0, 180, 20)}) == 9 == len(set(dropouts))


@pytest.mark.equation("alg 1", "phases", "learning rate")
def test_main_loop_holds_gates_then_frees_then_fixes_them_at_exactly_t_start_and_t_end():
    thetas, rates = [], []

    def look(step, loop):
        state = "held" if step < 8 else "free" if step < 20 else "fixed"
        assert all(layer.gate.state == state for layer in loop.layers), f"step {step}"
        assert state == "free" or all(bool((layer.gate() == 1).all()) for layer in loop.layers), f"step {step}"
        kept = sum(layer.r * layer.triplet_size for layer in loop.layers)
        total = total_parameters(loop.layers)
        assert kept == total if step < 20 else total - 18 < 2 * kept <= total, f"step {step} keeps {kept} of {total}"
        if step <= 20:
            thetas.append(torch.cat([layer.gate.log_theta.detach().clone() for layer in loop.layers]))
        [group] = loop.optimizer.param_groups
        rates.append(group["lr"])
        assert {id(p) for p in group["params"]} == {id(p) for layer in loop.layers for p in (layer.A, layer.B)}

    loop = Loop(look, lr=0.01)
    assert all(not theta.any() for theta in thetas[:9])
    assert float(thetas[9].abs().max()) == pytest.approx(14 / 12, rel=1e-3), "Adam's first step: eta = 14 / window"
    assert loop.C_end == loop.log[19]["C"] != loop.log[20]["C"], "C_end is what was expected just before T_end"
    assert {row["C"] for row in loop.log[20:]} == {kept_density(loop.layers)}
    assert rates == pytest.approx([0.01 * (1 - step / 40) for step in range(40)]), "a line down to 0"


@pytest.mark.equation("learning rate")
@pytest.mark.parametrize("restart", [False, True])
def test_main_loop_warms_the_learning_rate_up_and_restarts_it_at_t_end_if_asked(restart):
    rates = []
    Loop(lambda _, loop: rates.append(loop.optimizer.param_groups[0]["lr"]), lr=0.01, warmup=0.1, restart=restart)
    falls = [1 - (step - 20) / 20 if restart and step >= 20 else 1 - step / 40 for step in range(40)]
    starts = (0, 20) if restart else (0,)
    rising = {start + i: (i + 1) / 5 for start in starts for i in range(4)}  # a tenth of 40 steps
    assert rates == pytest.approx([0.01 * fall * rising.get(step, 1) for step, fall in enumerate(falls)])


@pytest.mark.equation("alg 1", "12")
def test_main_loop_drives_c_to_the_budget_and_lambda_up():
    loop = Loop(lambda *_: None, budget=0.75, steps=200)
    lam = [row["lam"] for row in loop.log]
    assert lam[:40] == [0] * 40 and all(a < b for a, b in zip(lam[39:99], lam[40:100], strict=True))
    assert len(set(lam[99:])) == 1, "lambda rests outside the window"
    assert abs(loop.C_end - 0.75) < 0.1, f"C is {loop.C_end:.3f}, but should be .75"


def test_predictions_come_in_the_order_of_the_rows():
    torch.manual_seed(3)
    rows = [([0] * (7 * i % 300), torch.randn(6), 0) for i in range(300)]
    for labels in (4, 1):
        model = nn.Sequential(nn.Linear(6, labels), nn.Dropout(0.9))
        outputs = [model.eval()(x[None])[0] for _, x, _ in rows]
        expected = [h.item() if labels == 1 else int(h.argmax()) for h in outputs]
        assert predict(model.train(), rows, "cpu", batch_of_rows) == pytest.approx(expected, abs=1e-5)


@pytest.mark.equation("12")
def test_loss_is_cross_entropy_of_classes_and_squared_error_of_scores():
    logits, scores = torch.randn(5, 3), torch.tensor([0.5, 5.0, 1, 2, 3])
    labels = torch.tensor([0, 2, 1, 1, 0])
    by_hand = sum(-torch.log(row.exp()[y] / row.exp().sum()) for row, y in zip(logits, labels, strict=True)) / 5
    assert torch.allclose(task_loss(logits, labels), by_hand)
    by_hand = sum((float(a) - float(b)) ** 2 for a, b in zip(logits[:, 0], scores, strict=True)) / 5
    assert float(task_loss(logits[:, :1], scores)) == pytest.approx(by_hand, rel=1e-5)
