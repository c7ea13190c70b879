"""A tiny decoder for the instructions of mini-GLUE's world: a causal transformer, pre-trained to tell the next word.

A row is (token ids, start): the words from index `start` on count, what comes before is only read. Left out: sampling
and beam search, a cache of keys and values.
"""

import random
from dataclasses import replace

import torch
import torch.nn.functional as F

from glue.instructions import InstructionTokenizer, texts_to_read
from glue.pretrain import LR, MINI, WARMUP, train, trained_once
from tiny_transformer import MaskedLM, TinyTransformer

TEXTS, STEPS, BATCH = 40_000, 6000, 32


class NextWord(MaskedLM):
    """Token ids and a mask of positions, each (batch, seq) -> logits of the word after each position (n, vocab)."""

    def forward(self, ids, positions):
        return super().forward(self.encoder(ids)[positions])


def batch_of(rows, model=None, device="cpu"):
    """Rows -> ((ids, positions), the next words there). No position attends to the padding after it."""
    longest = max(len(words) for words, _ in rows)
    ids = torch.tensor([words + [0] * (longest - len(words)) for words, _ in rows])  # (batch, seq)
    positions = torch.zeros_like(ids, dtype=torch.bool)
    for i, (words, start) in enumerate(rows):
        positions[i, start - 1 : len(words) - 1] = True
    labels = ids.roll(-1, 1)[positions]
    return (ids.to(device), positions.to(device)), labels.to(device)


def decoder_config():
    return replace(MINI, vocab_size=InstructionTokenizer().size, max_position_embeddings=72, type_vocab_size=1,
                   is_decoder=True)  # fmt: skip


def mini_decoder():
    """The folder of the pre-trained decoder, which is trained on first use, in about two minutes on one core."""
    recipe = (NextWord.__name__, decoder_config(), TEXTS, STEPS, WARMUP, LR, BATCH, texts_to_read(200))
    return trained_once("decoder", recipe, pretrain)


def pretrain():
    """Train a new decoder; prints its progress. Returns it in eval mode."""
    torch.manual_seed(0)
    lm, tokenizer, rng = NextWord(TinyTransformer(decoder_config())), InstructionTokenizer(), random.Random(0)
    rows = [(tokenizer.encode_pair(*text, 70)[0], 1) for text in texts_to_read(TEXTS)]
    rows.sort(key=lambda row: len(row[0]))  # texts of equal length share a batch
    batches = [rows[i : i + BATCH] for i in range(0, TEXTS, BATCH)]
    order = []

    def draw_loss():
        if not order:
            order.extend(rng.sample(batches, len(batches)))
        inputs, labels = batch_of(order.pop())
        return F.cross_entropy(lm(*inputs), labels)

    return train(lm, draw_loss, STEPS, "next-word loss")


@torch.no_grad()
def write(model, prompts, stop, most):
    """Go on from each prompt with the likeliest word, again and again, until `stop`, or `most` words.

    prompts: lists of token ids; they are padded on the left, which moves no position. Returns lists of token ids.
    """
    longest, pad = max(map(len, prompts)), model.encoder.config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])  # (batch, seq)
    for _ in range(most):
        last = torch.zeros_like(ids, dtype=torch.bool)
        last[:, -1] = True
        ids = torch.cat([ids, model(ids, last).argmax(1, keepdim=True)], 1)
        if (ids[:, longest:] == stop).any(1).all():
            break
    written = ids[:, longest:].tolist()
    return [words[: words.index(stop)] if stop in words else words for words in written]
