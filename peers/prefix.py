"""Trained vectors beside the words, in a frozen encoder.

`prefix_tuning` (Li and Liang, ACL 2021, arXiv 2101.00190): in every block l trained keys and l trained values, to which
all tokens may attend. `prompt_tuning` (Lester et al., EMNLP 2021, arXiv 2104.08691): l trained word vectors in front of
the sentence.
Neither starts as the frozen model: whatever the vectors are, they take a part of the attention from the start.
Left out: Li and Liang's network that makes the prefix while it trains, and is thrown away afterwards.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from tiny_transformer import Block, TinyTransformer


class PrefixBlock(Block):
    """A block of the encoder, made of another one's parts, whose attention sees l more keys and values."""

    def __init__(self, block, l, d, std):
        nn.Module.__init__(self)
        for name, part in block.named_children():
            setattr(self, name, part)
        self.heads, self.attention_dropout = block.heads, block.attention_dropout
        self.prefix_key = nn.Parameter(torch.randn(l, d) * std)
        self.prefix_value = nn.Parameter(torch.randn(l, d) * std)

    def attention(self, x, mask):
        batch, seq, d = x.shape
        keys = torch.cat([self.prefix_key.expand(batch, -1, -1), self.key(x)], dim=1)  # (batch, l + seq, d)
        values = torch.cat([self.prefix_value.expand(batch, -1, -1), self.value(x)], dim=1)  # (batch, l + seq, d)
        q, k, v = (h.view(batch, -1, self.heads, d // self.heads) for h in (self.query(x), keys, values))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (batch, heads, seq or l + seq, d / heads)
        mask = F.pad(mask, (len(self.prefix_key), 0), value=True)  # (batch, 1, 1, l + seq)
        p = self.attention_dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)  # (batch, heads, seq, d / heads)
        return self.out(h.transpose(1, 2).reshape(batch, seq, d))


def prefix_tuning(model, l):
    """Freeze the encoder, and give every block l trained keys and values. Per block 2 l d train."""
    layers, config = model.encoder.requires_grad_(False).layers, model.encoder.config
    for i, block in enumerate(layers):
        layers[i] = PrefixBlock(block, l, config.hidden_size, config.initializer_range)


class PromptedWords(nn.Module):
    """A frozen table `base` of word vectors, and l trained vectors in the place of the first l words of every row."""

    def __init__(self, base, l):
        super().__init__()
        self.base = base
        chosen = torch.randint(len(base.weight), (l,))  # it starts from words of the vocabulary, which did best
        self.prompt = nn.Parameter(base.weight[chosen].detach().clone())

    @property
    def weight(self):
        """The table, which the head of a masked LM shares."""
        return self.base.weight

    def forward(self, ids):
        """Token ids (batch, l + seq) -> (batch, l + seq, d)."""
        l = len(self.prompt)
        return torch.cat([self.prompt.expand(len(ids), -1, -1), self.base(ids[:, l:])], dim=1)


class PromptedTransformer(TinyTransformer):
    """An encoder, made of another one's parts, that reads l trained words before every sentence."""

    def __init__(self, encoder, l):
        nn.Module.__init__(self)
        for name, part in encoder.named_children():
            setattr(self, name, part)
        self.l, self.recompute = l, encoder.recompute
        self.word = PromptedWords(encoder.word, l)
        room = encoder.config.max_position_embeddings - l
        self.config = replace(encoder.config, max_position_embeddings=room)  # what is left for a sentence

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        """As the encoder's, and of the same shape: what comes out above the prompt is left out."""
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        any_word = int(self.config.pad_token_id == 0)  # PromptedWords replaces it; padding would have no position
        ids = F.pad(input_ids, (self.l, 0), value=any_word)  # (batch, l + seq)
        mask = F.pad(attention_mask, (self.l, 0), value=1)
        types = F.pad(token_type_ids, (self.l, 0))
        return super().forward(ids, mask, types)[:, self.l :]  # (batch, seq, d)


def prompt_tuning(model, l):
    """Freeze the encoder, and put l trained words in front of every sentence. l d parameters train."""
    model.encoder = PromptedTransformer(model.encoder.requires_grad_(False), l)
