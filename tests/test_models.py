"""Adapters in models that are not ours, and the main loop around one: outputs, gradients, files, noise, compilers."""

import copy

import pytest
import torch
from strategies import assert_close, generator, make_layer, normal
from torch import nn
from torch.utils.checkpoint import checkpoint

from budget import (
    FixedRanks,
    GateSchedule,
    RankAllocator,
    Recipe,
    expected_density,
    freeze_gates,
    kept_density,
    resample,
    total_parameters,
)
from cli.afterwards import predict
from salora import adapt, load_adapter, merge, orthogonality, prune, salora_layers, save_adapter
from train_glue_mini import fine_tune, task_loss

# Other models: (model in eval mode, its inputs, targets)


def mlp():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3, bias=False)), [torch.randn(4, 6)], ["0", "2"]


def conv_net():
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(body, nn.Linear(16, 5)), [torch.randn(3, 1, 8, 8)], ["1"]


SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def llama():
    transformers = pytest.importorskip("transformers")
    special = dict(vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **special, num_key_value_heads=1))
    return model, [torch.randint(3, 32, (2, 7))], ["q_proj", "v_proj"]


def vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    return transformers.ViTForImageClassification(config), [torch.randn(2, 1, 8, 8)], ["q_proj", "v_proj", "fc1"]


@pytest.fixture(params=[mlp, conv_net, llama, vit], ids=lambda f: f.__name__)
def build(request):
    """() -> model in eval mode, call, targets: the same numbers every time."""

    def again():
        torch.manual_seed(1)
        model, inputs, targets = request.param()

        def call(model):
            outputs = model(*inputs)
            return getattr(outputs, "logits", outputs)

        return model.eval(), call, targets

    return again


def randomize(model):
    """Give every adapter of a model a B and gates at random: some open, some closed, some between."""
    g = generator(3)
    for layer in salora_layers(model).values():
        layer.B.data.normal_(generator=g)
        layer.gate.release()
        layer.gate.log_theta.data = 3 * torch.randn(layer.r, generator=g)
    return model


@pytest.mark.equation("3")
def test_adapting_another_model_changes_no_output_and_only_triplets_and_gates_get_gradients(build):
    model, call, targets = build()
    before, weights = call(model), {name: p.clone() for name, p in model.named_parameters()}
    adapt(model, targets, r=3)
    assert torch.equal(call(model), before), "B = 0: nothing has changed"
    for layer in salora_layers(model).values():
        layer.gate.release()
    assert torch.equal(call(model), before), "B = 0: nothing has changed"
    call(model.train()).square().sum().backward()
    ours = {f"{name}.{p}" for name in salora_layers(model) for p in ("A", "B", "gate.log_theta")}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == ours
    for name, p in model.named_parameters():
        assert name in ours or torch.equal(p, weights[name.replace(".base.", ".")])


@pytest.mark.equation("merge")
def test_merging_in_another_model_gives_the_outputs_of_its_median_gates(build):
    model, call, targets = build()
    names = [name for name, _ in model.named_parameters()]
    randomize(adapt(model, targets, r=3))
    expected = call(model)
    merge(model)
    assert [name for name, _ in model.named_parameters()] == names and not salora_layers(model)
    assert_close(call(model), expected, 64)


@pytest.mark.equation("adapter file")
def test_an_adapter_of_another_model_comes_back_from_its_file(build, tmp_path):
    model, call, targets = build()
    layers = salora_layers(randomize(adapt(model, targets, r=3))).values()
    freeze_gates(layers, 0.5)
    for layer in layers:
        prune(layer)
    save_adapter(model, tmp_path / "adapter.pt")
    other, call, _ = build()
    assert not torch.equal(call(other), call(model))
    assert torch.equal(call(load_adapter(other, tmp_path / "adapter.pt")), call(model))


@pytest.mark.equation("3")
def test_adapting_gpt_2_is_refused_because_its_layers_are_transposed():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="target 'c_attn' matches only Conv1D; nn.Linear layers here: lm_head"):
        adapt(model, ["c_attn"])
    assert all(p.requires_grad for p in model.parameters()), "nothing is left half done"


# One layer


@pytest.mark.equation("prune", "merge")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("d,k,r", [(7, 4, 2), (4, 7, 2), (5, 5, 5), (6, 3, 3), (3, 6, 3), (4, 3, 1), (1, 1, 1)])
def test_freezing_pruning_and_merging_change_no_output_at_any_shape(d, k, r, bias):
    for density in (0.3, 0.7, 1.0):
        layer = make_layer(d, k, r, seed=d + k, bias=bias)
        x = normal(3, k, seed=1)
        freeze_gates([layer], density, survivors="median")
        expected = layer(x)
        prune(layer)
        assert layer.r <= density * r
        assert_close(layer(x), expected, k + r)
        assert_close(merge(layer)(x), expected, k + r)


@pytest.mark.equation("prune", "merge")
def test_pruning_and_merging_in_train_mode_ignore_the_noise():
    """What stays depends on the median gates, not on the noise of a step."""
    for use in (merge, lambda layer: prune(layer) is None or layer):
        layer = make_layer(5, 4, 6, seed=2)
        layer.gate.log_theta.data = torch.tensor([-9.0, -3, -1, 0, 1, 9], dtype=torch.float64)
        layer.gate.u.copy_(torch.tensor([0.5, 0.99, 0.01, 0.01, 0.3, 0.01]))
        x = normal(2, 4, seed=3)
        expected = layer.eval()(x)
        assert_close(use(layer.train()).eval()(x), expected, 16)


def free(layer):
    layer.gate.log_theta.data.copy_(torch.linspace(-0.5, 0.5, layer.r))
    return layer.train()


@pytest.mark.equation("noise")
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_sees_the_same_gates(reentrant):
    """Noise is a buffer, not a draw of the forward pass: what is computed again is the same to the last bit."""
    results = []
    for again in (False, True):
        layer = free(make_layer(6, 5, 4, seed=1))
        x = normal(3, 5, seed=2).requires_grad_()
        h = checkpoint(layer, x, use_reentrant=reentrant) if again else layer(x)
        h.square().sum().backward()
        results.append([h, x.grad, *(p.grad for p in (layer.A, layer.B, layer.gate.log_theta))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][-1].any(), "and the gates take part"


@pytest.mark.equation("5")
@pytest.mark.parametrize("phase", ["open", "window", "frozen", "pruned", "closed"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_is_one_graph_in_every_phase(phase, training):
    torch._dynamo.reset()
    layer = free(make_layer(6, 5, 4, seed=1)).train(training)
    if phase != "window":
        layer.gate.fix(torch.ones(4, dtype=torch.float64))
    if phase in ("frozen", "pruned", "closed"):
        freeze_gates([layer], 0.5 if phase != "closed" else 1e-9)
    if phase in ("pruned", "closed"):
        prune(layer)
    x = normal(3, 5, seed=2)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)  # a graph break is an error
    assert torch.equal(compiled(x), layer(x))
    resample([layer], generator(8))
    assert torch.equal(compiled(x), layer(x)), "new noise reaches the compiled layer"


# Counting and noise


@pytest.mark.equation("11")
def test_a_kept_gate_counts_whole_however_little_it_is_worth():
    layer = make_layer(5, 4, 4, seed=0)
    layer.gate.fix(torch.tensor([0.0, 0.01, 0.4, 1.0]))
    assert float(expected_density([layer])) == kept_density([layer]) == 0.75, "Eq. (11) counts parameters"
    assert len(prune(layer)) == 3


@pytest.mark.equation("noise")
@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_noise_that_falls_on_the_edge_is_moved_inside(monkeypatch, edge):
    layer = make_layer(5, 4, 3, seed=0, dtype=torch.float32)
    monkeypatch.setattr(torch, "rand", lambda n, **kw: torch.full((n,), edge))
    resample([layer])
    assert torch.isfinite(torch.logit(layer.gate.u)).all()


# The main loop, around a model that is not ours


def batch_of_rows(rows, model=None, device=None):
    return (torch.stack([x for _, x, _ in rows]),), torch.tensor([y for _, _, y in rows])


PAPER = dict(rule="budget", survivors="one", beta=0.05)


class Loop:
    """Runs `fine_tune` on a small net and calls `look(step, loop)` before every step of the optimizer."""

    def __init__(self, look, lr=2e-3, steps=40, accumulate=1, density=0.5, **changes):
        self.recipe = Recipe.paper(**{**PAPER, **changes})
        torch.manual_seed(0)
        self.model = adapt(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2)), ["0", "2"], 4, 8).eval()
        self.layers = list(salora_layers(self.model).values())
        frozen = {n: p.clone() for n, p in self.model.named_parameters() if ".base." in n}
        inputs = torch.randn(45, 6)
        rows = [([0] * (i % 3), x, int(x[0] + x[1] > 0)) for i, x in enumerate(inputs)]
        self.step, self.seen = 0, []
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        self.allocator = RankAllocator(self.model, self.optimizer, steps, density, self.recipe)

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


@pytest.mark.equation("alg 1", "12", "9")
@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_of_the_main_loop_are_those_of_alg_1(parts):
    """Those of every step, whatever came before, equal autograd's on the whole batch at once: Eqs. (5), (9), (12)."""
    phases = []

    def look(step, loop):
        twin = copy.deepcopy(loop.model).train()
        layers = list(salora_layers(twin).values())
        twin.zero_grad()
        (x,), labels = batch_of_rows([row for part, _ in loop.seen for row in part])
        loss = nn.functional.cross_entropy(twin(x), labels) + loop.recipe.beta * orthogonality(layers)
        if layers[0].gate.fixed is None:
            C, lam = expected_density(layers), loop.allocator.lagrangian.lam.detach()
            loss = loss + lam[0] * (C - 0.5) ** 2
        loss.backward()
        for (name, p), q in zip(loop.model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), f"step {step}: {name}"
            if q.grad is not None:
                assert torch.allclose(p.grad, q.grad, atol=1e-6), f"step {step}: {name}"
        phases.append("window" if layers[0].gate.fixed is None else "fixed")

    Loop(look, accumulate=parts, controller="quadratic")
    assert phases == ["fixed"] * 8 + ["window"] * 12 + ["fixed"] * 20


@pytest.mark.equation("alg 1", "noise")
def test_micro_batches_of_a_step_see_one_mask_and_every_step_of_the_window_its_own():
    masks = []

    def look(step, loop):
        gates = [g for _, g in loop.seen]
        assert len(gates) == min(3, sum(len(rows) for rows, _ in loop.seen))
        assert all(torch.equal(gates[0], other) for other in gates), f"step {step}"
        masks.append([layer.gate.u.clone() for layer in loop.layers])

    Loop(look, accumulate=3)
    window = [u for step in masks[8:20] for u in step]
    assert all(not torch.equal(a, b) for i, a in enumerate(window) for b in window[:i]), "across epochs and layers, too"


@pytest.mark.equation("noise")
def test_the_seed_of_an_allocator_decides_the_noise_of_every_step():
    def noise(seed):
        model = adapt(nn.Sequential(nn.Linear(6, 2)), ["0"], r=4)
        optimizer = torch.optim.SGD([model[0].A, model[0].B], lr=0.1)
        allocator = RankAllocator(model, optimizer, 3, recipe=Recipe(window=(0, 1)), seed=seed)
        drawn = []
        for step in range(3):
            allocator.before_step(step)
            drawn.append(model[0].gate.u.clone())
            model(torch.ones(1, 6)).sum().backward()
            allocator.after_backward()
            optimizer.step()
            allocator.after_step()
        return torch.stack(drawn)  # (steps, r)

    assert torch.equal(noise(1), noise(1)) and len(set(torch.cat([noise(1), noise(2)]).flatten().tolist())) == 2 * 3 * 4


@pytest.mark.equation("alg 1")
def test_every_epoch_of_every_seed_has_its_own_order_and_dropout():
    """The second epoch of seed 0 is not the first of seed 1."""
    orders, dropouts = [], []
    rows = [([0], torch.randn(6), i) for i in range(20)]
    for seed in range(3):
        seen = []

        def note(part, model, device):
            seen.extend(i for *_, i in part)
            dropouts.append(torch.initial_seed())
            return (torch.stack([x for _, x, _ in part]),), torch.zeros(len(part), dtype=torch.long)

        model = adapt(nn.Sequential(nn.Linear(6, 2)), ["0"], 1, 8)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
        fine_tune(model, rows, optimizer, FixedRanks(model, 6), lr=0.1, batch_size=10, seed=seed, batch_of=note)
        orders += [tuple(seen[i : i + 20]) for i in (0, 20, 40)]
    assert len(set(orders)) == len(orders) == 9 and len(set(dropouts)) == 9


@pytest.mark.equation("alg 1", "phases")
def test_main_loop_keeps_gates_open_then_free_then_fixed_at_exactly_t_start_and_t_end():
    thetas = []

    def look(step, loop):
        for layer in loop.layers:
            fixed = layer.gate.fixed
            assert (fixed is None) == (8 <= step < 20) and (fixed is None or bool((fixed == 1).all())), f"step {step}"
        kept = sum(layer.r * layer.triplet_size for layer in loop.layers)
        total = total_parameters(loop.layers)
        assert kept == total if step < 20 else total - 18 < 2 * kept <= total, f"step {step} keeps {kept} of {total}"
        if step <= 20:
            thetas.append(torch.cat([layer.gate.log_theta.detach().clone() for layer in loop.layers]))

    loop = Loop(look)
    assert all(not theta.any() for theta in thetas[:9])
    assert float(thetas[9].abs().max()) == pytest.approx(14 / 12, rel=1e-3), "Adam's first step: eta = 14 / window"
    assert loop.C_end == loop.log[19]["C"] != loop.log[20]["C"], "C_end is what was expected just before T_end"
    assert {row["C"] for row in loop.log[20:]} == {kept_density(loop.layers)}


@pytest.mark.equation("learning rate")
def test_main_loop_lowers_the_learning_rate_linearly_and_moves_a_and_b_only():
    rates = []

    def look(step, loop):
        rates.extend(group["lr"] for group in loop.optimizer.param_groups)
        assert sum(group["lr"] == rates[-1] for group in loop.optimizer.param_groups) == 1
        tensors = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
        assert tensors == {id(p) for layer in loop.layers for p in (layer.A, layer.B)}

    Loop(look, lr=0.01)
    assert rates == pytest.approx([0.01 * (1 - step / 40) for step in range(40)])


@pytest.mark.equation("learning rate")
@pytest.mark.parametrize("restart", [False, True])
def test_main_loop_warms_the_learning_rate_up_anew_and_restarts_it_if_asked(restart):
    """It rises at the start and at both ends of the window; with a restart it falls from the top twice."""
    rates = []

    def look(step, loop):
        rates.append(loop.optimizer.param_groups[0]["lr"])

    Loop(look, lr=0.01, warmup=0.1, restart=restart)
    falls = [1 - (step - 20) / 20 if restart and step >= 20 else 1 - step / 40 for step in range(40)]
    rising = {start + i: (i + 1) / 5 for start in (0, 8, 20) for i in range(4)}  # a tenth of 40 steps
    assert rates == pytest.approx([0.01 * fall * rising.get(step, 1) for step, fall in enumerate(falls)])


@pytest.mark.equation("alg 1", "12")
def test_main_loop_drives_c_to_the_density_and_lambda_up():
    for density in (0.5, 0.75):
        loop = Loop(lambda *_: None, density=density, steps=200)
        lam = [row["lam"] for row in loop.log]
        assert lam[:40] == [0] * 40 and all(a < b for a, b in zip(lam[39:99], lam[40:100], strict=True))
        assert len(set(lam[99:])) == 1, "lambda rests outside the window"
        assert abs(loop.C_end - density) < 0.1, f"C is {loop.C_end:.3f}, but should be {density}"


@pytest.mark.equation("projection")
def test_projection_in_the_main_loop_leads_c_down_to_the_density():
    loop = Loop(lambda *_: None, controller="projection", density=0.25)
    aims = [GateSchedule(40).target_at(step, 0.25) for step in range(8, 20)]
    assert aims[0] > 0.7 and aims[-1] == 0.25 and sorted(aims, reverse=True) == aims
    assert [row["C"] for row in loop.log[8:20]] == pytest.approx(aims, abs=1e-4)
    assert not any(row["lam"] for row in loop.log)


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
