"""What the papers of Child-Tuning, MAM and ProPELT state. How they run in the main job: test_program.py."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import parts_of_steps
from strategies import assert_close, generator, seeds
from test_tiny_transformer import small_encoder
from torch import nn
from torch.nn import functional as F

from peers import TARGETS, adapters, install, made_plain, propelt
from peers.child_tuning import ChildTuning, fisher_information, largest
from peers.fixed_ranks import FixedRanks
from peers.mam import SCALE, MAMBlock
from peers.propelt import MaskedLoRA, Pair, mask_of
from salora import SaLoRALinear, merge, replace_modules, salora_layers
from tiny_transformer import SequenceClassifier

D, M, LAYERS = 12, 20, 2  # of small_encoder
IDS = torch.randint(3, 20, (24, 5), generator=generator(0))
LABELS = torch.arange(24) % 3


def encoder():
    torch.manual_seed(0)
    return SequenceClassifier(small_encoder(), 3)


def installed(name, size=5):
    model = encoder()
    install(model, name, size)
    return model


def losses_of(model, batch=8):
    return lambda: (F.cross_entropy(model(IDS[i : i + batch]), LABELS[i : i + batch]) for i in range(0, 24, batch))


class Loop:
    """Trains a model on all rows. Iterating over it does so, and stops after each part of every step."""

    def __init__(self, model, make, steps=12, **flags):
        self.model, self.steps = model.train(), steps
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, **flags)
        self.allocator = make(model, self.optimizer, steps)

    def __iter__(self):
        return parts_of_steps(self, lambda model: F.cross_entropy(model(IDS), LABELS))

    def train(self):
        for _ in self:
            pass
        return self.model


def child_tuning(share):
    return lambda model, *rest: ChildTuning(model, *rest, losses_of(model), share)


# Child-Tuning


@pytest.mark.equation("child-tuning")
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.floats(0.01, 1))
def test_a_mask_has_the_largest_share_of_all_entries_together_and_of_equal_ones_all(entries, share):
    tensors = list(torch.tensor(entries).float().split(max(1, len(entries) // 3)))
    masks = largest(tensors, share)
    assert [m.shape for m in masks] == [t.shape for t in tensors]
    k = max(1, round(share * len(entries)))
    smallest = sorted(entries, reverse=True)[k - 1]
    assert torch.cat(masks).tolist() == [entry >= smallest for entry in entries]


@pytest.mark.equation("child-tuning")
def test_fisher_information_is_the_sum_of_squared_gradients_of_one_loss_after_the_other():
    model = encoder().eval()
    parameters = list(model.encoder.layers.parameters())
    found = fisher_information(parameters, losses_of(model, batch=1)())
    expected = [torch.zeros_like(p) for p in parameters]
    for ids, label in zip(IDS, LABELS, strict=True):
        F.cross_entropy(model(ids[None]), label[None]).backward()
        for total, p in zip(expected, parameters, strict=True):
            total += p.grad**2
        model.zero_grad()
    for ours, naive in zip(found, expected, strict=True):
        assert_close(ours, naive, 24)
    assert all(p.grad is None for p in parameters), "it leaves no gradients behind"


@pytest.mark.equation("child-tuning")
def test_child_tuning_of_all_weights_is_full_fine_tuning_to_the_bit():
    """Dropout included: choosing the weights draws nothing from torch's generator."""
    trained = []
    for make in (FixedRanks, child_tuning(1.0)):
        model = encoder()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.2
        torch.manual_seed(1)
        trained.append(Loop(model, make).train().state_dict())
    whole, child = trained
    assert all(torch.equal(value, child[name]) for name, value in whole.items())


@pytest.mark.equation("child-tuning")
def test_child_tuning_changes_the_chosen_weights_of_the_blocks_and_no_others():
    """Neither momentum nor weight decay: embeddings and the head train whole."""
    before, loop = encoder(), Loop(encoder(), child_tuning(0.2), weight_decay=0.5)
    masks = largest(fisher_information(list(before.eval().encoder.layers.parameters()), losses_of(before)()), 0.2)
    names = [name for name, _ in loop.model.named_parameters() if ".layers." in name]
    chosen = dict(zip(names, masks, strict=True))
    for when in loop:
        if when == "after_backward":  # so that a clipping of gradients sees only what is updated
            assert not any(p.grad[~chosen[n]].any() for n, p in loop.model.named_parameters() if n in chosen)
    assert 0.2 <= torch.cat([m.flatten() for m in masks]).float().mean() < 0.21
    for (name, p), old in zip(loop.model.named_parameters(), before.parameters(), strict=True):
        moved = p != old
        assert torch.equal(moved, chosen[name]) if name in chosen else moved.any(), name


@pytest.mark.equation("child-tuning")
def test_child_tuning_chooses_what_its_authors_choose_but_for_rounding():
    """They take what is not below the percentile 100 (1 - p)."""
    model = encoder().eval()
    total = fisher_information(list(model.encoder.layers.parameters()), losses_of(model)())
    threshold = np.percentile(torch.cat([f.flatten() for f in total]).numpy(), (1 - 0.3) * 100)
    differ = [(f >= threshold) != M for f, M in zip(total, largest(total, 0.3), strict=True)]
    assert sum(int(d.sum()) for d in differ) <= 1


@pytest.mark.equation("child-tuning")
def test_child_tuning_takes_the_steps_of_its_authors_optimizer():
    """Their AdamW in a plain loop: masked gradients, moments with bias correction, decay at the end of a step."""
    loop, twin = Loop(encoder(), child_tuning(0.3), weight_decay=0.0, eps=1e-6), encoder()
    state = {}
    for when in loop:
        if when != "after_step":
            continue
        step = loop.allocator.step
        loss = F.cross_entropy(twin.train()(IDS), LABELS) if step > 1 else None
        if step == 1:  # the masks are there once the first step has begun
            ours = dict(zip(twin.encoder.layers.parameters(), loop.allocator.masks, strict=True))
            loss = F.cross_entropy(twin.eval()(IDS), LABELS)
        loss.backward()
        for p in twin.parameters():
            grad = p.grad * ours[p] if p in ours else p.grad
            m, v = state.get(p, (torch.zeros_like(p), torch.zeros_like(p)))
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            state[p] = m, v
            size = 0.01 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            p.data -= size * m / (v.sqrt() + 1e-6 * math.sqrt(1 - 0.999**step))  # torch adds eps after the correction
            p.grad = None
    for p, expected in zip(loop.model.parameters(), twin.parameters(), strict=True):
        assert (p - expected).abs().max() < 1e-5


@pytest.mark.equation("child-tuning")
@pytest.mark.parametrize("stop", [0, 5])
def test_child_tuning_resumed_goes_on_equal_to_the_bit(stop):
    whole, half, rest = (Loop(encoder(), child_tuning(0.3)) for _ in range(3))
    expected = whole.train().state_dict()
    for when in half if stop else ():
        if when == "after_step" and half.allocator.step == stop:
            break
    for part in ("model", "optimizer", "allocator"):
        getattr(rest, part).load_state_dict(copy.deepcopy(getattr(half, part).state_dict()))
    after = rest.train().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in expected.items())


@pytest.mark.equation("child-tuning")
@pytest.mark.parametrize("share", [0, 1.5])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match=rf"share must be in \(0, 1\], got {share}"):
        Loop(encoder(), child_tuning(share))


# MAM


@pytest.mark.equation("mam")
@given(seeds, st.sampled_from([0, 3]))
def test_mam_is_a_scaled_adapter_beside_the_feed_forward_net_and_with_a_prefix_of_size_0_nothing_else(seed, l):
    model, plain = encoder().double().eval(), encoder().double().eval()
    x = torch.randn(2, 4, D, generator=generator(seed), dtype=torch.float64)
    mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    old = plain.encoder.layers[0]
    block = MAMBlock(model.encoder.layers[0], l, 7, model.encoder.config).double().eval()
    for p in block.adapter.parameters():
        p.data.normal_(generator=generator(seed))
    down, up = block.adapter.down, block.adapter.up
    attended = block.attention(x, mask)
    if l == 0:
        assert_close(attended, old.attention(x, mask), D)
    z = old.norm1(x + attended)
    beside = (z @ down.weight.T + down.bias).clamp_min(0) @ up.weight.T + up.bias
    inner = old.up(z)
    ffn = old.down(inner * (1 + torch.erf(inner / 2**0.5)) / 2)
    assert_close(block(x, mask), old.norm2(z + ffn + SCALE * beside), 64)


@pytest.mark.equation("mam")
@pytest.mark.parametrize("m,l", [(5, 1), (16, 1), (40, 2)])
def test_the_prefix_of_mam_is_small_its_adapter_large_and_at_first_only_the_prefix_counts(m, l):
    blocks = installed("mam", m).encoder.layers
    for block in blocks:
        assert block.prefix_key.shape == block.prefix_value.shape == (l, D)
        assert block.adapter.down.weight.shape == (m, D) and block.adapter.down.weight.any()
        assert not any(p.any() for p in (*block.adapter.up.parameters(), block.adapter.down.bias))


# ProPELT


@pytest.mark.equation("propelt")
@given(st.integers(1, 40), st.floats(0.01, 1), seeds)
def test_a_mask_is_1_for_the_share_with_the_largest_scores_and_its_gradient_goes_to_their_size(n, share, seed):
    s = torch.randperm(4 * n, generator=generator(seed))[:n].float() - 2 * n + 0.5  # no two of one size
    s = (s.sign() * (s.abs() + 0.1 * (s > 0))).requires_grad_(True)
    m = mask_of(s, share)
    closed = int((1 - share) * n)
    smallest = sorted(range(n), key=lambda i: abs(s[i].item()))[:closed]
    assert m.tolist() == [0.0 if i in smallest else 1.0 for i in range(n)]
    weights = torch.randn(n, generator=generator(seed + 1))
    (weights * m).sum().backward()
    assert torch.equal(s.grad, weights * s.detach().sign())


def authors_mask(scores, k):
    """As GetSubnet in the authors' code: sort, the first (1 - k) n become 0 and the others 1."""
    order = scores.abs().flatten().sort().indices
    flat = torch.zeros(scores.numel())
    flat[order[int((1 - k) * scores.numel()) :]] = 1
    return flat.view(scores.shape)


@pytest.mark.equation("propelt")
@pytest.mark.parametrize("kind", ["adapter", "prefix", "lora"])
def test_propelt_equals_its_method_with_the_prototype_masked_in_every_layer(kind):
    """The plain method whose weights are the prototype times the authors' masks, layer by layer."""
    model, x = installed(f"propelt-{kind}").eval(), IDS
    for p in model.encoder.parameters():
        if p.requires_grad:
            p.data.normal_(generator=generator(p.numel()))
    plain = installed({"adapter": "adapter-p", "prefix": "prefix", "lora": "lora"}[kind]).eval()
    share = propelt.SHARE[kind]
    for ours, block in zip(model.encoder.layers, plain.encoder.layers, strict=True):
        if kind == "adapter":
            masked, adapter = ours.norm2, block.norm2
            for mask, linear, theta in (
                (masked.mask_down, adapter.down, masked.prototype.down),
                (masked.mask_up, adapter.up, masked.prototype.up),
            ):
                linear.weight.data = theta.weight * authors_mask(mask.s, share)
                linear.bias.data = theta.bias.clone()
        if kind == "prefix":
            block.prefix_key.data = ours.prototype.key * authors_mask(ours.mask_key.s, share)
            block.prefix_value.data = ours.prototype.value * authors_mask(ours.mask_value.s, share)
        for name in TARGETS if kind == "lora" else ():
            masked, layer = getattr(ours, name), getattr(block, name)
            layer.A.data = masked.prototype.A * authors_mask(masked.mask_A.s, share)
            layer.B.data = masked.prototype.B * authors_mask(masked.mask_B.s, share)
            layer.alpha = propelt.SCALE * layer.r0
    assert_close(model(x), plain(x), 64)


@pytest.mark.equation("propelt")
@pytest.mark.parametrize("kind,modules", [("adapter", 2), ("prefix", 2), ("lora", 12)])
def test_all_layers_share_one_prototype_and_have_masks_of_their_own(kind, modules):
    model = installed(f"propelt-{kind}")
    names = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith("encoder")]
    assert sum(n.endswith(".s") for n in names) == LAYERS * modules
    assert all(n.startswith("encoder.layers.0.") for n in names if ".prototype." in n), "under its first name only"
    loop = Loop(model, FixedRanks)
    before = {n: p.clone() for n, p in model.named_parameters()}
    loop.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert set(names) <= moved, "prototype and scores train together"


@pytest.mark.equation("propelt")
def test_propelt_lora_with_all_ones_for_masks_is_lora_that_all_layers_share(monkeypatch):
    monkeypatch.setitem(propelt.SHARE, "lora", 1.0)
    model = installed("propelt-lora")
    shared = copy.deepcopy(model)
    pairs, new = {}, {}
    for block in shared.encoder.layers:
        for name in TARGETS:
            masked = getattr(block, name)
            layer = SaLoRALinear(masked.base, 5, 5 * propelt.SCALE)
            first = pairs.setdefault(name, layer)
            layer.A, layer.B = first.A, first.B  # the same Parameters
            first.A.data.copy_(masked.prototype.A)
            layer.gate.fix(torch.ones(5))
            new[id(masked)] = layer
    replace_modules(shared, new)
    for one in (model, shared):
        torch.manual_seed(1)
        Loop(one, FixedRanks).train().eval()
    assert_close(model(IDS), shared(IDS), 512)
    assert not torch.allclose(model(IDS), installed("propelt-lora").eval()(IDS), atol=1e-2)


@pytest.mark.equation("propelt", "merge")
def test_propelt_lora_becomes_plain_lora_with_the_same_outputs_and_merges():
    model = Loop(installed("propelt-lora"), FixedRanks).train().eval()
    outputs = model(IDS).detach()
    plain = made_plain(model).eval()
    assert len(salora_layers(plain)) == 6 * LAYERS and not any(isinstance(m, MaskedLoRA) for m in plain.modules())
    assert_close(plain(IDS), outputs, 64)
    closed = [(layer.A == 0).float().mean().item() for layer in salora_layers(plain).values()]
    assert all(0.8 < share < 1 for share in closed), "a tenth of the entries is left"
    assert_close(merge(plain)(IDS), outputs, 64)


@pytest.mark.equation("propelt")
def test_scores_start_as_much_smaller_as_the_authors_learn_them_faster():
    p = nn.Parameter(torch.zeros(64, 16))
    for kind, speed in propelt.SPEED.items():
        s = propelt.Mask(p, kind).s.abs()
        assert 0.9 / 4 / speed < s.max() <= 1 / 4 / speed and abs(s.mean() - 1 / 8 / speed) < 0.02 / speed


def test_a_pair_starts_as_the_triplets_of_a_layer_do():
    """With variance 1 / k, and without an effect."""
    pair = Pair(30, 400, 50)
    assert pair.A.shape == (50, 400) and abs(pair.A.var() * 400 - 1) < 0.05 and not pair.B.any()
    assert pair.B.shape == (30, 50)
    assert isinstance(installed("propelt-adapter").encoder.layers[0].norm2.prototype, adapters.Adapter)
