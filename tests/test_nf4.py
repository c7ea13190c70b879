"""NF4: levels, codes, their storage, and layers that keep weights in it. QLoRA in the main job: test_program.py."""

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import assert_close, generator, seeds
from test_tiny_transformer import small_encoder
from torch import nn

from cli.setup import frozen_digest
from peers import TARGETS, install, made_plain
from peers.nf4 import BLOCK, NF4Linear, dequantize, dynamic_levels, nf4_levels, pack, quantize, unpack
from salora import adapt, merge, salora_layers
from tiny_transformer import SequenceClassifier

pytestmark = pytest.mark.equation("nf4")


@st.composite
def values(draw):
    """Any number of values: normal, of any scale, with blocks that are 0 or that one outlier dominates."""
    n, scale = draw(st.integers(1, 400)), 10.0 ** draw(st.integers(-30, 30))
    x = torch.randn(n, generator=generator(draw(seeds))) * scale
    kind = draw(st.sampled_from(["as it is", "a block of 0", "an outlier"]))
    if kind == "a block of 0":
        x[: 2 * BLOCK] = 0
    if kind == "an outlier":
        x[draw(st.integers(0, n - 1))] = 100 * scale
    return x


def linear(d, k, seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(k, d, bias=bias)


# Levels


def test_levels_are_quantiles_of_the_normal_distribution_stretched_to_1_on_both_sides_of_an_exact_0():
    levels = nf4_levels().double()
    assert len(levels) == 16 and levels[7] == 0 and levels[0] == -1 and levels[-1] == 1
    assert (levels.diff() > 0).all()
    edge = (1 / 32 + 1 / 30) / 2
    widest = torch.special.ndtri(torch.tensor(1 - edge, dtype=torch.float64))
    probabilities = torch.special.ndtr(levels * widest)
    for half, steps in ((probabilities[:8], 7), (probabilities[7:], 8)):
        assert torch.allclose(half.diff(), torch.full((steps,), (0.5 - edge) / steps, dtype=torch.float64), atol=1e-7)


def test_levels_for_absolute_maxima_are_symmetric_but_for_1_and_get_finer_toward_0_by_tens():
    levels = dynamic_levels()
    assert len(levels) == len(set(levels.tolist())) == 256 and (levels.diff() > 0).all()
    assert levels[127] == 0 and levels[-1] == 1 and torch.equal(levels[:127], -levels[128:-1].flip(0))
    for exponent in range(7):
        top = 10.0 ** (exponent - 6)
        assert ((levels > top / 10) & (levels < top)).sum() == 2**exponent


# Codes


@given(values())
@example(torch.zeros(70))
def test_a_value_gets_the_nearest_level_of_its_block(x):
    codes, c = quantize(x, nf4_levels(), BLOCK)
    assert codes.shape == x.shape and codes.dtype == torch.uint8 and len(c) == -(-len(x) // BLOCK)
    for block in range(len(c)):
        part = x[block * BLOCK : (block + 1) * BLOCK]
        assert c[block] == part.abs().max()
        distances = (part[:, None] - c[block] * nf4_levels()).abs()  # (entries, 16)
        chosen = distances.gather(1, codes[block * BLOCK : (block + 1) * BLOCK, None].long())
        assert (chosen[:, 0] <= distances.amin(1) + 1e-6 * c[block]).all()


@given(values())
def test_what_comes_back_is_off_by_half_the_widest_gap_at_most_and_0_and_the_largest_value_not_at_all(x):
    codes, c = quantize(x, nf4_levels(), BLOCK)
    back = dequantize(codes, c, nf4_levels(), BLOCK)
    largest = c.repeat_interleave(BLOCK)[: len(x)]
    assert ((back - x).abs() <= largest * (nf4_levels().diff().max() / 2 + 1e-6)).all()
    assert torch.equal(back[x == 0], x[x == 0]) and (codes[x == 0] == 7).all()
    assert torch.equal(back[x.abs() == largest], x[x.abs() == largest])


@given(values())
def test_quantizing_again_changes_nothing(x):
    codes, c = quantize(x, nf4_levels(), BLOCK)
    again, same = quantize(dequantize(codes, c, nf4_levels(), BLOCK), nf4_levels(), BLOCK)
    live = c.repeat_interleave(BLOCK)[: len(x)] > 1e-30  # smaller ones lose digits
    assert torch.equal(c, same) and torch.equal(again[live], codes[live])


@given(st.lists(st.integers(0, 15), min_size=1, max_size=9))
def test_two_codes_are_one_byte_the_first_in_its_upper_half_and_come_back(codes):
    codes = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and len(packed) == (len(codes) + 1) // 2
    assert packed[0] == 16 * codes[0] + (codes[1] if len(codes) > 1 else 0)
    assert torch.equal(unpack(packed, len(codes)), codes)


# Layers


def bits(layer):
    return 8 * sum(p.numel() * p.element_size() for name, p in layer.named_parameters() if name != "bias")


def test_a_weight_takes_4_127_bits_and_its_layer_32_more():
    layer = NF4Linear(linear(256, 512))
    assert bits(layer) - 32 == 256 * 512 * (4 + 8 / 64 + 32 / (64 * 256))
    assert (bits(layer) - 32) / (256 * 512) == pytest.approx(4.127, abs=5e-4)


@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), seeds)
def test_a_layer_of_any_shape_computes_with_the_weights_that_its_codes_stand_for(d, k, bias, seed):
    """Its plain form, an nn.Linear, has the same outputs and gives its inputs the same gradients."""
    original = linear(d, k, seed, bias)
    layer = NF4Linear(original)
    plain = layer.plain()
    assert type(plain) is nn.Linear and plain.weight.shape == (d, k) and (plain.bias is None) == (not bias)
    c = original.weight.abs().max()
    # half a gap of NF4, and of c in 8 bits at most half a step of 1/64 times .9, relative to the spread of c
    assert (plain.weight - original.weight).abs().max() <= c * (nf4_levels().diff().max() / 2 + 0.9 / 128 + 1e-6)
    x = torch.randn(2, 3, k, requires_grad=True)
    assert_close(layer(x), plain(x), k)
    weights = torch.randn(2, 3, d)
    [ours] = torch.autograd.grad(layer(x), x, weights)
    [theirs] = torch.autograd.grad(plain(x), x, weights)
    assert_close(ours, theirs, d)
    assert not any(p.requires_grad for name, p in layer.named_parameters() if name != "bias")


def test_all_parts_of_a_layer_count_as_frozen_weights_of_a_run():
    """A run goes on, or is opened again, only over the same ones."""
    model = nn.Sequential(NF4Linear(linear(6, 4)))
    digests = [frozen_digest(model)]
    for part in ("codes", "c_codes", "c_scales", "c_mean"):
        getattr(model[0], part).data += 1
        digests.append(frozen_digest(model))
    assert len(set(digests)) == 5


def test_between_forward_and_backward_no_weight_is_kept():
    kept = []
    layer, x = NF4Linear(linear(64, 64)), torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
        assert sum(kept) < 64 * 64
        layer.plain()(x)
    assert sum(kept) >= 64 * 64, "as an nn.Linear does"


def test_a_layer_computes_in_the_dtype_of_its_input_or_of_autocast():
    layer, x = NF4Linear(linear(8, 8)), torch.randn(2, 8)
    assert layer(x).dtype == torch.float32 and layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_triplets_on_a_base_in_4_bits_are_float32_train_and_merge_once_it_is_plain():
    torch.manual_seed(0)
    model = nn.Sequential(NF4Linear(linear(12, 6)), nn.Tanh(), NF4Linear(linear(3, 12)))
    x, labels = torch.randn(64, 6), torch.arange(64) % 3
    frozen = model(x)
    adapt(model, ["0", "2"], r=4, alpha=8)
    assert torch.equal(model(x), frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and len(trained) == 4
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    before = copy.deepcopy(model.state_dict())
    for _ in range(20):
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) == (name[-1] not in "AB") for name, value in before.items())
    outputs = model.eval()(x).detach()
    with pytest.raises(ValueError, match="0 is a NF4Linear, whose weight cannot be added to"):
        merge(model)
    merged = merge(made_plain(model))
    assert [type(m) for m in merged] == [nn.Linear, nn.Tanh, nn.Linear]
    assert_close(merged(x), outputs, 16)


@pytest.mark.parametrize("name", ["qlora", "salora"])
def test_all_matrices_of_the_blocks_are_quantized_under_any_triplets(name):
    model = SequenceClassifier(small_encoder(), 3)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    install(model, name, 3, quantize="nf4" if name == "salora" else None)
    layers = salora_layers(model)
    assert {n.rsplit(".", 1)[-1] for n in layers} == set(TARGETS)
    assert all(type(layer.base) is NF4Linear for layer in layers.values())
    for n, layer in layers.items():
        assert torch.equal(layer.base.weight, NF4Linear(as_linear(frozen[f"{n}.weight"])).weight)
    assert torch.equal(model.classifier.out_proj.weight, frozen["classifier.out_proj.weight"])


def as_linear(W):
    layer = nn.Linear(W.shape[1], W.shape[0])
    layer.weight.data = W
    return layer


# bitsandbytes


def assert_same_codes(codes, theirs, x, levels, rounding):
    """Equal, but where x lies so close to the middle between two levels that rounding decides."""
    ours, other = ((levels[c.long()] - x).abs() for c in (codes, theirs))  # how far off
    assert ((other - ours).abs() <= rounding).all() and (codes != theirs).float().mean() < 0.01


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(64, 64), (17, 31), (300, 1024), (1, 1)])
def test_levels_codes_and_absolute_maxima_are_those_of_bitsandbytes(shape):
    theirs = pytest.importorskip("bitsandbytes").functional
    assert (nf4_levels() - theirs.get_4bit_type("nf4", device="cpu")).abs().max() < 1e-6
    assert torch.equal(dynamic_levels(), theirs.create_dynamic_map())
    W = torch.randn(shape, generator=generator(0))
    packed, state = theirs.quantize_4bit(W, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    _, single = theirs.quantize_4bit(W, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    codes, c = quantize(W, nf4_levels(), BLOCK)
    assert (c - single.absmax).abs().max() < 1e-6
    scaled = W.flatten() / c.repeat_interleave(BLOCK)[: W.numel()]
    assert_same_codes(codes, unpack(packed.flatten(), W.numel()), scaled, nf4_levels(), 1e-6)

    layer = NF4Linear(as_linear(W))
    assert abs(layer.c_mean - state.offset) < 1e-6 and (layer.c_scales - state.state2.absmax).abs().max() < 1e-6
    scale = layer.c_scales.repeat_interleave(256)[: len(c)]
    if scale.all():  # with a single block there is nothing left once the mean is gone
        assert_same_codes(layer.c_codes, state.absmax, (c - c.mean()) / scale, dynamic_levels(), 5e-5)
    if shape[1] % BLOCK == 0:  # of other shapes the version for CPUs gives back other weights than it was given
        c = dequantize(state.absmax, state.state2.absmax, dynamic_levels(), 256) + state.offset
        back = dequantize(unpack(packed.flatten(), W.numel()), c, nf4_levels(), BLOCK)
        assert (back.view(shape) - theirs.dequantize_4bit(packed, state)).abs().max() < 2e-6
