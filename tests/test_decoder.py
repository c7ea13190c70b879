"""The study on a real decoder: plain losses, sentences that are held out, and one line for what cannot be used."""

import json
import random
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DECODER_WORDS

from experiments import decoder
from experiments.arms import arm_of
from experiments.study import TUNE_SEED
from glue.decoder import batch_of
from hub.decoder import load_decoder

pytest.importorskip("transformers")
NAMES = ["sentiment.dev.0", "sentiment.dev.1", "sentiment.test.0", "sentiment.test.1"]


@pytest.fixture
def flags(tmp_path, tiny_decoder):
    """Flags of a short run."""
    for seed, name in enumerate(NAMES):
        rng = random.Random(seed)
        texts = [" ".join(rng.choices(DECODER_WORDS, k=rng.randrange(1, 9))) for _ in range(30)]
        (tmp_path / name).write_text("\n\n".join(texts) + "\n")
    decoder.data_of.cache_clear()
    run = ["--model", str(tiny_decoder), "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    yield [*run, "--steps", "10", "--batch-size", "4", "--seeds", "0"]
    decoder.data_of.cache_clear()


def rows(n=40):
    """Rows of all lengths; the words of some count only from their middle on."""
    rng = random.Random(0)
    ids = [[1, *rng.choices(range(3, 23), k=rng.randrange(1, 9)), 2] for _ in range(n)]
    return [(words, 1 + i % (len(words) - 1)) for i, words in enumerate(ids)]


@torch.no_grad()
def test_the_loss_is_the_mean_that_a_loop_over_all_words_gives(tiny_decoder, monkeypatch):
    monkeypatch.setattr(decoder, "EVAL_BATCH", 7)
    model, _ = load_decoder(tiny_decoder)
    losses = []
    for ids, start in rows():
        log_p = model.lm(torch.tensor([ids])).logits[0].log_softmax(-1)  # (seq, vocab), without any padding
        losses += [-log_p[t - 1, ids[t]].item() for t in range(start, len(ids))]
    assert decoder.loss_of(model, rows()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    inputs, labels = batch_of(rows())
    assert F.cross_entropy(model(*inputs), labels).item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_held_out_sentences_and_those_to_tune_on_are_not_trained_on(flags, tmp_path, tiny_decoder, monkeypatch):
    texts = [" ".join(DECODER_WORDS[i : i + 3]) for i in range(9)]
    for name, some in zip(NAMES, (texts[:6], texts[3:4], texts[5:8], texts[8:])):
        (tmp_path / name).write_text("\n \n".join(some))
    monkeypatch.setattr(decoder, "TUNING", 1)
    train, tuning, held_out = decoder.data_of(str(tiny_decoder), str(tmp_path))
    known = [[1, *(3 + DECODER_WORDS.index(word) for word in text.split()), 2] for text in texts]
    assert [ids for ids, _ in held_out] == known[5:]
    assert len(tuning) == 1 and tuning[0] not in train + held_out and not any(row in held_out for row in train)
    scored = []
    monkeypatch.setattr(decoder, "loss_of", lambda model, rows: scored.append(rows) or 1.0)
    args = decoder.STUDY.parser().parse_args(flags)
    for seed in (TUNE_SEED, 0):
        decoder.measure(args, "sentences", arm_of("lora-4"), seed, (1e-3,))
    assert scored == [tuning, held_out]


def test_a_seed_decides_which_sentences_share_a_batch(flags, monkeypatch):
    seen = []
    monkeypatch.setattr(decoder.study, "fit", lambda model, batches, *_, **more: seen.append(batches))
    args = decoder.STUDY.parser().parse_args(flags)
    for seed in (0, 0, 1):
        decoder.measure(args, "sentences", arm_of("lora-4"), seed, (1e-3,))
    one, again, other = seen
    assert one == again != other and sorted(sum(one, [])) == sorted(sum(other, []))


def test_an_arm_that_was_not_tuned_takes_the_rate_of_its_family_or_of_lora(flags):
    decoder.main([*flags[:-2], "--tune", "--grid", "1e-4", "1e-2", "--arms", "lora-2", "salora-16-to-2"])
    found = decoder.main([*flags, "--arms", "lora-4", "salora-16-to-1", "lora-8-restart", "--precision", "bf16"])
    assert {row["trial"] for row in found} == {"0.01"}
    for row, size in zip(found, (4, 1, 8)):
        assert len(json.loads(row["ranks"])) == 14 and size / 8 - 0.02 < float(row["size"]) <= size / 8


def changed(source, target, **values):
    """A copy of a decoder's folder with another config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **values}))
    return str(target)


@pytest.mark.parametrize("flag, value, said", [
    ("--model", "nowhere", "no config.json in nowhere"),
    ("--model", {"num_hidden_layers": 3}, "lacks weights of the model in config.json: model.layers.2."),
    ("--model", {"model_type": "gpt_neox", "architectures": None}, "config.json"),
    ("--model", None, "needs transformers: pip install -r req"),
    ("--data", "nowhere", "no file nowhere"),
    ("--data", "", "a run needs --model and --data"),
    ("--arms", "bitfit", "this study trains triplets alone"),
    ("--arms", "alora-8-to-4", "holds out no rows for ALoRA"),
    ("--device", "warp", "no device 'warp'"),
])  # fmt: skip
def test_what_cannot_be_used_is_one_line_and_exit_status_2(flag, value, said, tmp_path, flags, tiny_decoder, capsys,
                                                           monkeypatch):  # fmt: skip
    if value is None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        value = str(tiny_decoder)
    if isinstance(value, dict):
        value = changed(tiny_decoder, tmp_path / "model", **value)
    with pytest.raises(SystemExit) as stopped:
        decoder.main([*flags, flag, value])
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and text.count("\n") == 1 and said in text
