"""The encoder that the generated tasks need: a small RoBERTa, pre-trained as a masked language model on mini-GLUE.
It is kept with its masked-LM head: `load_pretrained(mini_encoder(), MaskedLM)` predicts words.

Half of the words of one sentence of a pair are hidden, so that the other sentence has to be consulted, and 30 % of a
sentence that stands alone. Of the hidden words 55 % become <mask>, 35 % the word that another text has at that
position, 10 % stay: a model that must tell right words from plausible ones learns to compare.
"""

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

from glue import mini
from glue.tokens import MiniTokenizer, collate
from hub.roberta import save_pretrained
from tiny_transformer import MaskedLM, TinyTransformer, TransformerConfig

TEXTS, BATCH, STEPS, WARMUP, LR = 40_000, 64, 1400, 50, 3e-3
MINI = TransformerConfig(
    vocab_size=MiniTokenizer().size,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=48,
    type_vocab_size=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.1,
)


def mini_encoder(folder="runs", device="cpu"):
    """The folder of the pre-trained encoder, which is trained on first use, in about 40 s on two cores."""
    world = Path(mini.__file__).read_text(encoding="utf-8")  # which generates all that it reads
    recipe = (MaskedLM.__name__, MINI, TEXTS, BATCH, STEPS, WARMUP, LR, world)
    return trained_once("encoder", recipe, lambda: pretrain(device), folder)


def trained_once(kind, recipe, train, folder="runs"):
    """The folder of the model that train() returns: trained on first use, and kept under a name that changes with
    `recipe`, everything that the training depends on."""
    path = Path(folder) / f"mini-{kind}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]}"
    if not path.is_dir():
        print(f"pre-training the tiny {kind}, once; it is kept in {path}")
        part = path.with_name(f"{path.name}.part{os.getpid()}")
        part.mkdir(parents=True, exist_ok=True)  # if that is impossible, then better now than after training
        try:
            model = train()
            save_pretrained(model, part)
            with suppress(OSError):  # another run was faster
                part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return path


def corrupt(ids, types, tokenizer, generator):
    """Hide words of a batch. ids, types (batch, seq) -> (ids with words hidden, mask of the positions to predict)."""
    pair = types.any(1, keepdim=True)  # (batch, 1)
    side = torch.randint(2, (len(ids), 1), generator=generator)
    rate = torch.where(pair, 0.5 * (types == side), torch.tensor(0.3))  # (batch, seq)
    chance, kind = (torch.rand(ids.shape, generator=generator) for _ in range(2))
    hidden = (chance < rate) & (ids > tokenizer.mask)  # words only
    ids = torch.where(hidden & (kind >= 0.55) & (kind < 0.9), ids.roll(1, 0), ids)  # the next text's word there
    return ids.masked_fill(hidden & (kind < 0.55), tokenizer.mask), hidden


def pretrain(device="cpu", steps=STEPS):
    """Train a new MaskedLM; prints its progress. Returns it in eval mode."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tokenizer = MiniTokenizer()
    lm = MaskedLM(TinyTransformer(MINI)).to(device)
    texts = tokenizer.encode([(*text, 0) for text in mini.corpus(TEXTS)])
    texts.sort(key=lambda text: len(text[0]))  # texts of equal length meet in a batch: no padding
    batches = [collate(texts[i : i + BATCH], tokenizer.pad) for i in range(0, TEXTS, BATCH)]

    order = []

    def draw_loss():
        if not order:
            order.extend(torch.randperm(len(batches), generator=generator).tolist())
        ids, _, types, _ = batches[order.pop()]
        seen, hidden = corrupt(ids, types, tokenizer, generator)
        states = lm.encoder(seen.to(device), token_type_ids=types.to(device))  # (batch, seq, d)
        return F.cross_entropy(lm(states[hidden.to(device)]), ids[hidden].to(device))

    return train(lm, draw_loss, steps, "masked-word loss")


def train(lm, draw_loss, steps, name):
    """Minimize the loss that draw_loss() finds on a new batch; prints it under its name. Returns lm in eval mode."""
    optimizer = torch.optim.AdamW(lm.parameters(), lr=LR, betas=(0.9, 0.98), fused=True)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / WARMUP) * (1 - step / steps)
        loss = draw_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            left = (time.time() - started) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1:4d}/{steps} | {name} {loss.item():.2f} | eta {left:.0f} s", flush=True)
    return lm.eval()
