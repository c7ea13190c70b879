"""Words to numbers: one tokenizer for the generated tasks, those of real checkpoints, and the way into batches.

A tokenizer has `encode(rows, max_length)`: rows (sentence, sentence or None, label) become (ids, type_ids, label),
special tokens included, the longer sentence cut first where a row is longer than max_length tokens.
"""

import random

import torch

from budget import on_device
from glue import mini
from hub.tokenizers import load_tokenizer

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # numbers 0 to 4, as in RoBERTa but for <mask>


class MiniTokenizer:
    """The words of mini-GLUE: <s> first </s> second </s>, type 0 up to the first </s> and 1 after it."""

    def __init__(self):
        self.words = SPECIAL + mini.VOCABULARY
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.start, self.pad, self.stop, self.unknown, self.mask = range(len(SPECIAL))
        self.size = len(self.words)

    def encode(self, rows, max_length=64):
        return [(*self.encode_pair(first, second, max_length), label) for first, second, label in rows]

    def encode_pair(self, first, second, max_length):
        a, b = ([self.ids.get(word, self.unknown) for word in (text or "").split()] for text in (first, second))
        while len(a) + len(b) + (3 if second else 2) > max_length:
            (a if len(a) > len(b) else b).pop()
        left, right = [self.start, *a, self.stop], [*b, self.stop] if second else []
        return left + right, [0] * len(left) + [1] * len(right)


def tokenizer_for(folder, config, mini):
    """The tokenizer of a checkpoint folder; for a generated task, where there is none, that of mini-GLUE.

    Raises FileNotFoundError if there is none, and ValueError for one with more words than the encoder of `config` has.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        tokenizer = MiniTokenizer()
        if not mini or config.vocab_size < tokenizer.size or config.pad_token_id != tokenizer.pad:
            raise FileNotFoundError(f"no tokenizer.json, vocab.json or vocab.txt in {folder}")
    if tokenizer.size > config.vocab_size:
        words = f"{tokenizer.size} words, but config.json says vocab_size {config.vocab_size}"
        raise ValueError(f"the tokenizer in {folder} has {words}: take both from one checkpoint")
    return tokenizer


def collate(rows, pad, longest=None):
    """Encoded rows -> input_ids, attention_mask, token_type_ids, each (batch, longest) int64, and labels (batch,).

    longest: how long rows become by padding; by default the length of the longest.
    """
    longest = longest or max(len(ids) for ids, _, _ in rows)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _, _ in rows])
    types = torch.tensor([types + [0] * (longest - len(types)) for _, types, _ in rows])
    return ids, mask, types, torch.tensor([label for _, _, label in rows])


def batch_of(rows, model, device):
    """Encoded rows -> (the model's inputs, labels), on the device."""
    config, longest = model.encoder.config, max(len(ids) for ids, _, _ in rows)
    if torch.device(device).type == "cuda":
        longest = min(-(-longest // 8) * 8, config.max_length)  # few lengths, so that few shapes are recorded
    ids, mask, types, labels = (on_device(x, device) for x in collate(rows, config.pad_token_id, longest))
    return (ids, mask, types if config.type_vocab_size > 1 else None), labels


def batches_of(rows, size, seed):
    """The rows of an epoch, shuffled, in lists of `size`; the last may be shorter."""
    rows = random.Random(seed).sample(rows, len(rows))
    return [rows[i : i + size] for i in range(0, len(rows), size)]
