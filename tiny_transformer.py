"""A RoBERTa encoder in one file, small enough to train on a laptop and exact enough to hold real checkpoints.

Post-LN Transformer encoder: x = norm(x + f(x)) after attention and after the feed-forward net, exact GELU, learned
positions that start at pad + 1 and leave padding out. BERT is the same network, but its positions count padding as
well; its position table gets pad + 1 unused rows in front. With `is_decoder` a token sees itself and earlier ones only.
Two heads: `MaskedLM` for pre-training, of a decoder too, and `SequenceClassifier` for tasks. Left out: caches,
cross-attention, relative positions.
Names of parameters are ours; hub/roberta.py translates them, and reads and writes published checkpoints.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class TransformerConfig:
    """Sizes of an encoder, under the keys of a published config.json; the defaults are RoBERTa-base's."""

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 514  # rows of the table; the first pad + 1 are never used
    type_vocab_size: int = 1
    pad_token_id: int = 1
    layer_norm_eps: float = 1e-5
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # in a SequenceClassifier's head; None: hidden_dropout_prob
    initializer_range: float = 0.02
    is_decoder: bool = False  # a causal mask: no token sees a later one
    model_type: str = "roberta"  # or "bert": the names and the position offset of the checkpoint

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if self.pad_token_id >= self.vocab_size or self.max_length < 1:
            raise ValueError(f"pad_token_id {self.pad_token_id} leaves no id or no position for a token")

    @property
    def max_length(self):
        """The longest input, in tokens."""
        return self.max_position_embeddings - self.pad_token_id - 1


class Block(nn.Module):
    """Self-attention and a feed-forward net, each with a residual and a LayerNorm after it."""

    def __init__(self, config):
        super().__init__()
        d, m, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, m), nn.Linear(m, d)
        self.norm1, self.norm2 = nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.heads, self.attention_dropout = config.num_attention_heads, config.attention_probs_dropout_prob

    def attention(self, x, mask):
        batch, seq, d = x.shape
        q, k, v = (f(x).view(batch, seq, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        p = self.attention_dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)  # (batch, heads, seq, d / heads)
        return self.out(h.transpose(1, 2).reshape(batch, seq, d))

    def forward(self, x, mask):
        """x (batch, seq, d), mask (batch, 1, 1 or seq, seq) True for what may be attended to -> (batch, seq, d)."""
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))


class TinyTransformer(nn.Module):
    """Token ids (batch, seq) -> hidden states (batch, seq, d)."""

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.word = nn.Embedding(config.vocab_size, d, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, d, padding_idx=config.pad_token_id)
        self.token_type = nn.Embedding(config.type_vocab_size, d)
        self.norm = nn.LayerNorm(d, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.recompute = False  # activation checkpointing: less memory, more time
        init_weights(self, config)

    @classmethod
    def from_pretrained(cls, folder, **changes):
        """The encoder in the folder of a RoBERTa or BERT checkpoint: see `load_pretrained` in hub/roberta.py."""
        from hub.roberta import load_pretrained

        return load_pretrained(folder, **changes)[0]

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        """input_ids (batch, seq); attention_mask (batch, seq), 1 = attend to it, by default all that is not padding;
        token_type_ids (batch, seq), by default 0. Returns (batch, seq, d)."""
        real = input_ids != self.config.pad_token_id
        if attention_mask is None:
            attention_mask = real
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        counted = torch.ones_like(real) if self.config.model_type == "bert" else real  # BERT counts padding, too
        positions = counted.cumsum(1) * counted + self.config.pad_token_id  # the first token stands at pad + 1
        x = self.word(input_ids) + self.position(positions) + self.token_type(token_type_ids)  # (batch, seq, d)
        x = self.dropout(self.norm(x))
        mask = attention_mask.bool()[:, None, None, :]  # (batch, 1, 1, seq)
        if self.config.is_decoder:
            seq = input_ids.shape[1]
            mask = mask & mask.new_ones(seq, seq).tril()  # (batch, 1, seq, seq)
        for block in self.layers:
            again = self.recompute and self.training
            x = checkpoint(block, x, mask, use_reentrant=False) if again else block(x, mask)
        return x


class SequenceClassifier(nn.Module):
    """RoBERTa's head on the first token: dense, tanh, out_proj. One label means regression."""

    def __init__(self, encoder, num_labels):
        super().__init__()
        if encoder.config.is_decoder:
            raise ValueError("a classifier reads the first token, which sees no other in a decoder: take an encoder")
        d = encoder.config.hidden_size
        self.encoder, self.num_labels = encoder, num_labels
        self.classifier = nn.ModuleDict({"dense": nn.Linear(d, d), "out_proj": nn.Linear(d, num_labels)})
        rate = encoder.config.classifier_dropout
        self.dropout = nn.Dropout(encoder.config.hidden_dropout_prob if rate is None else rate)
        init_weights(self.classifier, encoder.config)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        """Token ids (batch, seq) -> logits, or for one label scores, (batch, num_labels)."""
        x = self.encoder(input_ids, attention_mask, token_type_ids)[:, 0]  # (batch, d)
        x = torch.tanh(self.classifier["dense"](self.dropout(x)))
        return self.classifier["out_proj"](self.dropout(x))


class MaskedLM(nn.Module):
    """Scores of every word at every position: dense, GELU, norm, then the transposed word embedding plus a bias."""

    def __init__(self, encoder):
        super().__init__()
        config = encoder.config
        self.encoder, self.lm_head = encoder, nn.Module()
        self.lm_head.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.lm_head.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head.bias = nn.Parameter(torch.zeros(config.vocab_size))
        init_weights(self.lm_head, config)

    def forward(self, x):
        """Hidden states (..., d), all or only those of masked positions -> logits (..., vocab)."""
        x = self.lm_head.norm(F.gelu(self.lm_head.dense(x)))
        return F.linear(x, self.encoder.word.weight, self.lm_head.bias)


def init_weights(model, config):
    """RoBERTa's start: weights normal with deviation `initializer_range`, biases and padding rows 0.

    A model on the meta device, which has shapes only, is left alone.
    """
    if next(model.parameters()).is_meta:
        return  # even draws into nothing take torch most of a second
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight.data[module.padding_idx])
