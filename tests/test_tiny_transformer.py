"""The encoder against a naive one in plain loops. Against `transformers`, with its files: test_roberta.py."""

import math

import pytest
import torch
from strategies import generator, randomize
from torch import nn

from budget import resample, total_parameters
from hub.roberta import save_pretrained
from salora import adapt, salora_layers
from tiny_transformer import MaskedLM, SequenceClassifier, TinyTransformer, TransformerConfig

pytestmark = pytest.mark.equation("encoder")
SMALL = dict(vocab_size=40, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
             max_position_embeddings=20, type_vocab_size=2, pad_token_id=1, hidden_dropout_prob=0.0,
             attention_probs_dropout_prob=0.0, initializer_range=0.3)  # fmt: skip


def small_encoder(**changes):
    torch.manual_seed(0)
    encoder = TinyTransformer(TransformerConfig(**{**SMALL, **changes}))
    for p in encoder.parameters():  # no LayerNorm and no bias at its neutral start
        p.data.add_(0.1 * torch.randn_like(p))
    return encoder.eval()


def batch(pad=1, vocab=40):
    """Two rows, the second padded, with types: (ids, mask, types)."""
    ids = torch.randint(5, vocab, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]])
    return ids.masked_fill(mask == 0, pad), mask, types


def naive_encoder(encoder, ids, types):
    """One unpadded row (seq,) through the encoder, written out without a library attention or norm."""
    c, p = encoder.config, dict(encoder.named_parameters())

    def norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + c.layer_norm_eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    positions = [c.pad_token_id + 1 + i for i in range(len(ids))]
    x = norm(p["word.weight"][ids] + p["position.weight"][positions] + p["token_type.weight"][types], "norm")
    size = c.hidden_size // c.num_attention_heads
    for i in range(c.num_hidden_layers):
        q, k, v = (linear(x, f"layers.{i}.{name}") for name in ("query", "key", "value"))
        heads = []
        for h in range(c.num_attention_heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            if c.is_decoder:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, float("-inf"))
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            heads.append(weights @ v[:, part])
        x = norm(x + linear(torch.cat(heads, -1), f"layers.{i}.out"), f"layers.{i}.norm1")
        u = linear(x, f"layers.{i}.up")
        gelu = u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))  # the exact one
        x = norm(x + linear(gelu, f"layers.{i}.down"), f"layers.{i}.norm2")
    return x


@pytest.mark.parametrize("is_decoder", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("eps", [1e-12, 0.1])
def test_encoder_and_decoder_equal_the_naive_one_and_padding_on_either_side_changes_nothing(is_decoder, eps):
    """In eval mode, whatever the dropout."""
    drop = dict(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    encoder = small_encoder(is_decoder=is_decoder, layer_norm_eps=eps, **drop).double()
    ids, mask, types = batch()
    hidden = encoder(ids, mask, types)
    assert torch.allclose(hidden[0], naive_encoder(encoder, ids[0], types[0]), atol=1e-12)
    assert torch.allclose(hidden[1, :4], naive_encoder(encoder, ids[1, :4], types[1, :4]), atol=1e-12)
    assert torch.equal(hidden, encoder(ids, None, types)), "without a mask, padding is not looked at"
    assert torch.equal(encoder(ids), encoder(ids, mask, 0 * types)), "types are 0 unless told"
    left = torch.cat([torch.full((2, 3), 1), ids], 1)
    assert torch.allclose(encoder(left)[:, 3:][mask == 1], encoder(ids)[mask == 1], atol=1e-12)


def test_masked_tokens_are_not_looked_at():
    encoder = small_encoder()
    ids, mask, types = batch()
    other = ids.clone()
    other[1, 5] = 17  # behind the mask, but not padding
    changed = encoder(other, mask, types)[1, :4]
    assert torch.allclose(changed, encoder(ids, mask, types)[1, :4], atol=1e-6)
    assert not torch.allclose(encoder(other, None, types)[1, :4], changed, atol=1e-3)


def test_positions_start_at_pad_plus_one_and_padding_keeps_the_padding_position():
    encoder = small_encoder(pad_token_id=3)
    seen = []
    encoder.position.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    encoder(torch.tensor([[7, 8, 9, 3, 3]]))
    assert seen[0].tolist() == [[4, 5, 6, 3, 3]]
    assert encoder.config.max_length == 20 - 3 - 1


def test_masked_lm_head_is_dense_gelu_norm_and_the_tied_embedding():
    lm, x = MaskedLM(small_encoder()), torch.randn(4, 12)
    h = nn.functional.layer_norm(nn.functional.gelu(lm.lm_head.dense(x)), (12,), eps=1e-5)
    lm.lm_head.bias.data.normal_()
    assert torch.allclose(lm(x), h @ lm.encoder.word.weight.T + lm.lm_head.bias, atol=1e-5)


def test_classifier_reads_the_first_token_through_dense_tanh_out_proj():
    model = SequenceClassifier(small_encoder(), 3).eval()
    ids, mask, types = batch()
    head = model.classifier
    expected = head["out_proj"](torch.tanh(head["dense"](model.encoder(ids, mask, types)[:, 0])))
    assert torch.equal(model(ids, mask, types), expected) and expected.shape == (2, 3)


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_encoder_drops_out_in_train_mode(rate):
    ids, mask, types = batch()
    encoder = small_encoder(**{rate: 0.5}).train()
    assert not torch.allclose(encoder(ids, mask, types), encoder.eval()(ids, mask, types), atol=1e-3)


def test_recomputing_activations_changes_no_gradient():
    """With dropout and free gates: what is computed again must draw the same."""
    ids, mask, types = batch()
    grads = []
    for again in (False, True):
        encoder = adapt(small_encoder(hidden_dropout_prob=0.5), ["query", "down"], r=2).requires_grad_(True)
        resample(salora_layers(randomize(encoder)), generator(1))
        encoder.train().recompute = again
        torch.manual_seed(5)
        encoder(ids, mask, types).square().sum().backward()
        grads.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_encoder_starts_with_the_deviation_of_its_config_zero_biases_and_zero_padding_rows():
    sizes = dict(vocab_size=300, hidden_size=60, num_attention_heads=2, num_hidden_layers=1, intermediate_size=90)
    encoder = TinyTransformer(TransformerConfig(**sizes))
    for name, p in encoder.named_parameters():
        if p.dim() == 2:
            pad = encoder.config.pad_token_id
            if name in ("word.weight", "position.weight"):
                assert not p[pad].any() and p[pad - 1].any(), name
            assert abs(float(p.detach().std()) / 0.02 - 1) < 0.2, name
        else:
            assert torch.equal(p, torch.full_like(p, float("norm" in name and name.endswith("weight")))), name


def test_roberta_has_the_published_numbers_of_parameters_and_of_gates():
    large = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    for sizes, parameters, budgeted, gates in (
        ({}, 124_055_040, 1_327_104, 576),  # without a pooler; 1.33 M in the paper
        (large, 354_310_144, 3_538_944, 1152),  # 3.54 M
    ):
        with torch.device("meta"):
            encoder = TinyTransformer(TransformerConfig(**sizes))
            assert sum(p.numel() for p in encoder.parameters()) == parameters
            adapt(encoder, ["query", "key", "value", "out", "up", "down"], 8, 16)
        layers = salora_layers(encoder).values()
        assert sum(layer.r for layer in layers) == gates and total_parameters(layers) == budgeted


def test_impossible_shapes_and_a_classifier_around_a_decoder_are_refused():
    with pytest.raises(ValueError, match="hidden_size 12 is not a multiple of 5 heads"):
        TransformerConfig(hidden_size=12, num_attention_heads=5)
    with pytest.raises(ValueError, match="pad_token_id 3 leaves no id or no position for a token"):
        TransformerConfig(vocab_size=9, pad_token_id=3, max_position_embeddings=4)
    with pytest.raises(ValueError, match="reads the first token, which sees no other in a decoder"):
        SequenceClassifier(small_encoder(is_decoder=True), 2)


def test_an_encoder_opens_its_own_folder(tmp_path):
    encoder, (ids, mask, types) = small_encoder(), batch()
    save_pretrained(encoder, tmp_path)
    loaded = TinyTransformer.from_pretrained(tmp_path, hidden_dropout_prob=0.25)
    assert torch.equal(loaded(ids, mask, types), encoder(ids, mask, types)) and loaded.dropout.p == 0.25
