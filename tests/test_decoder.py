"""The study on a real decoder: plain losses, arms of their size, differences in pairs, and no run done twice."""

import json
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import DECODER_WORDS

from experiments import decoder
from experiments.arms import arm_of

pytest.importorskip("transformers")
NAMES = ["sentiment.dev.0", "sentiment.dev.1", "sentiment.test.0", "sentiment.test.1"]


def sentences(n, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(DECODER_WORDS, k=rng.randrange(1, 9))) for _ in range(n)]


@pytest.fixture
def flags(tmp_path, tiny_decoder):
    """Flags of a short run."""
    for seed, name in enumerate(NAMES):
        (tmp_path / name).write_text("\n".join(sentences(30, seed)) + "\n")
    run = ["--model", str(tiny_decoder), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    return [*run, "--steps", "10", "--batch-size", "4", "--device", "cpu"]


def rows(n=40):
    """Rows of all lengths; the words of some count only from their middle on."""
    rng = random.Random(0)
    ids = [[1, *rng.choices(range(3, 23), k=rng.randrange(1, 9)), 2] for _ in range(n)]
    return [(words, 1 + i % (len(words) - 1)) for i, words in enumerate(ids)]


# The decoder


@torch.no_grad()
def test_the_loss_of_every_row_is_the_sum_that_a_loop_over_its_words_gives(tiny_decoder, monkeypatch):
    monkeypatch.setattr(decoder, "EVAL_BATCH", 7)
    model, _ = decoder.load(tiny_decoder)
    nats, words = decoder.losses_of(model, rows())
    for (ids, start), loss, count in zip(rows(), nats, words, strict=True):
        log_p = model.lm(torch.tensor([ids])).logits[0].log_softmax(-1)  # (seq, vocab), without any padding
        assert loss == pytest.approx(-sum(log_p[t - 1, ids[t]].item() for t in range(start, len(ids))), rel=1e-4)
        assert count == len(ids) - start


def test_a_batch_asks_for_every_word_that_counts_and_for_no_padding():
    some = [([1, 5, 6, 2], 1), ([1, 7, 2], 2), ([1, 3, 4, 5, 6, 2], 4)]
    (ids, places), labels = decoder.batch_of([some])
    expected = [(i, t - 1, words[t]) for i, (words, start) in enumerate(some) for t in range(start, len(words))]
    assert [(i, t) for i, t, _ in expected] == [tuple(place) for place in places.nonzero().tolist()]
    assert [word for *_, word in expected] == labels.tolist() and ids.shape == places.shape == (3, 6)


def test_what_is_trained_on_is_the_mean_loss_of_the_words_of_a_batch(tiny_decoder):
    model, _ = decoder.load(tiny_decoder)
    inputs, labels = decoder.batch_of([rows()])
    nats, words = decoder.losses_of(model, rows())
    assert F.cross_entropy(model(*inputs), labels).item() == pytest.approx(sum(nats) / sum(words), rel=1e-4)


def test_only_adapters_of_the_seven_maps_train_and_they_lower_the_loss(tiny_decoder):
    model, _ = decoder.load(tiny_decoder)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss = sum(decoder.losses_of(model, rows())[0])
    arm, batches = arm_of("lora-4"), decoder.in_batches(rows(), 8, seed=0)
    decoder.fit(model, batches, 4, lambda *parts: arm.allocator(*parts, 30, 0), lr=1e-2, seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in trained} == set(decoder.TARGETS)
    assert len(trained) == 2 * 7 * 2 and all(name.endswith((".A", ".B")) for name in trained)
    frozen = {name: p for name, p in model.named_parameters() if name not in trained and "log_theta" not in name}
    assert all(torch.equal(p, before[name.replace(".base.", ".")]) for name, p in frozen.items())
    assert sum(decoder.losses_of(model, rows())[0]) < 0.9 * loss


def test_a_seed_decides_which_sentences_share_a_batch():
    batches = decoder.in_batches(rows(), 4, 0)
    assert [len(batch) for batch in batches] == [4] * 10
    assert sorted(sum(batches, []), key=repr) == sorted(rows(), key=repr)
    lengths = [len(ids) for batch in batches for ids, _ in batch]
    assert lengths == sorted(lengths)
    assert decoder.in_batches(rows(), 4, 0) == batches != decoder.in_batches(rows(), 4, 1)


def test_held_out_sentences_are_read_whole_and_are_not_trained_on(tmp_path, tiny_decoder, flags, monkeypatch):
    (tmp_path / "sentiment.test.0").write_text("the film was good .\n\n a dog saw the cat .\n")
    (tmp_path / "sentiment.dev.0").write_text("a dog saw the cat .\nthe cat saw a dog .\n")
    args = SimpleNamespace(model=tiny_decoder, data=tmp_path, train=NAMES[:1], held_out=NAMES[2:3])
    data = decoder.Data(args)
    known = [[1, *(3 + DECODER_WORDS.index(word) for word in text.split()), 2] for text in
             ("the film was good .", "a dog saw the cat .", "the cat saw a dog .")]  # fmt: skip
    assert data.held_out == [(known[0], 1), (known[1], 1)] and data.train == [(known[2], 1)]
    monkeypatch.setattr(decoder, "HELD_OUT", 1)
    assert decoder.Data(args).held_out == [(known[0], 1)]


def test_rows_to_tune_on_are_neither_trained_on_nor_reported(tmp_path, tiny_decoder, monkeypatch):
    texts = [" ".join(DECODER_WORDS[i : i + 3]) for i in range(8)]
    (tmp_path / "sentiment.dev.0").write_text("\n".join(texts[:6]))
    (tmp_path / "sentiment.test.0").write_text("\n".join(texts[5:]))
    monkeypatch.setattr(decoder, "TUNING", 1)
    args = SimpleNamespace(model=tiny_decoder, data=tmp_path, train=NAMES[:1], held_out=NAMES[2:3], device="cpu")
    args.steps, args.batch_size, args.precision = 1, 2, "fp32"
    data = decoder.Data(args)
    assert [len(some) for some in (data.train, data.tuning, data.held_out)] == [4, 1, 3]
    assert data.tuning[0] not in data.train + data.held_out
    arm = decoder.arm_of("lora-4")
    counted = {seed: decoder.measure(args, data, arm, 1e-3, seed)[2] for seed in (decoder.TUNE_SEED, 0)}
    assert [len(words) for words in counted.values()] == [1, 3], "tuning scores the rows to tune on, others do not"


# The study


def test_every_arm_ends_within_its_size_and_nothing_is_run_twice(tmp_path, flags, capsys):
    found = decoder.main(["--seeds", "0", *flags])
    assert [row["arm"] for row in found] == decoder.ARMS
    for row in found:
        ranks, R = json.loads(row["ranks"]), arm_of(row["arm"]).rank
        assert len(ranks) == 14 and R / 8 - 0.02 < float(row["size"]) <= R / 8, row
        if row["arm"].startswith(("lora", "restart")):
            assert set(ranks) == {R}
    files = ["decoder.csv", "sentences.csv"]
    before = [(tmp_path / "out" / name).read_bytes() for name in files]
    assert decoder.main(["--seeds", "0", *flags]) == found
    assert [(tmp_path / "out" / name).read_bytes() for name in files] == before
    more = decoder.main(["--seeds", "0", "1", "--arms", "lora-1", "ours-1", *flags])
    assert [(row["arm"], row["seed"]) for row in more[9:]] == [("lora-1", "1"), ("ours-1", "1")]
    capsys.readouterr()
    decoder.main(["--report", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "ours-1 - lora-1" in said and "of the gap from lora-4 to lora-8, ours-4 closes" in said
    assert (tmp_path / "out" / "decoder.png").stat().st_size > 5000


def same_runs(out):
    rows = decoder.read_table(out / "decoder.csv")
    nats, words = decoder.read_sentences(out)
    return [{**row, "seconds": None} for row in rows], {arm: str(some) for arm, some in nats.items()}, words.tolist()


def test_an_interrupted_study_goes_on_to_the_same_rows(tmp_path, flags, monkeypatch, capsys):
    flags += ["--arms", "lora-2", "ours-2", "--seeds", "0", "1"]
    decoder.main(flags)
    again = [*flags, "--out", str(tmp_path / "again")]
    whole, calls = decoder.append, []

    def stop_between_two_files(path, row):
        calls.append(path.name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        whole(path, row)

    monkeypatch.setattr(decoder, "append", stop_between_two_files)
    with pytest.raises(SystemExit) as stopped:
        decoder.main(again)
    assert stopped.value.code == 130 and calls[-2:] == ["sentences.csv", "decoder.csv"]
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(decoder, "append", whole)
    assert len(decoder.main(again)) == 4
    assert same_runs(tmp_path / "again") == same_runs(tmp_path / "out")


def test_each_arm_takes_the_best_learning_rate_of_its_own_trials(tmp_path, flags, capsys):
    tuning = ["--tune", "--grid", "1e-4", "1e-2", "--arms", "lora-2", "ours-2", *flags]
    trials = decoder.main(tuning)
    assert [(row["arm"], row["lr"], row["seed"]) for row in trials] == [
        (arm, lr, "100") for arm in ("lora-2", "ours-2") for lr in ("0.0001", "0.01")
    ]
    assert decoder.main(tuning) == trials, "what is there is not done again"
    losses = [float(row["loss"]) for row in trials]
    assert losses[0] > losses[1] and f"ours-2     {losses[3]:.4f} (0.01), {losses[2]:.4f}" in capsys.readouterr().out
    rows = [{"arm": "lora-4", "lr": lr, "loss": loss} for lr, loss in (("0.001", "2.0"), ("0.002", "1.5"))]
    rows += [{"arm": "ours-4", "lr": lr, "loss": loss} for lr, loss in (("0.001", "1.5"), ("0.002", "inf"))]
    rates = {name: decoder.rate_of(arm_of(name), rows) for name in ("lora-4", "restart-8", "ours-4", "svd-2")}
    assert rates == {"lora-4": 0.002, "restart-8": 0.002, "ours-4": 0.001, "svd-2": 0.001}
    assert decoder.rate_of(arm_of("lora-4"), []) == decoder.LR


def test_bf16_is_used_where_it_is_asked_for_and_never_mixed_with_fp32(flags, capsys):
    [fp32] = decoder.main(["--arms", "lora-2", "--seeds", "0", *flags])
    bf16 = ["--arms", "lora-2", "--seeds", "0", *flags, "--precision", "bf16"]
    with pytest.raises(SystemExit):
        decoder.main(bf16)
    assert "holds runs of --precision fp32: give the same" in capsys.readouterr().err
    [row] = decoder.main([*bf16, "--out", flags[flags.index("--out") + 1] + "-bf16"])
    assert row["loss"] != fp32["loss"] and float(row["loss"]) == pytest.approx(float(fp32["loss"]), rel=0.05)


# The report


def write_sentences(out, nats):
    """Runs of ten-word sentences. nats: {(arm, seed): nats of every sentence}."""
    for (arm, seed), some in nats.items():
        each = {"nats": json.dumps(some), "words": json.dumps([10] * len(some))}
        decoder.append(out / "sentences.csv", {"arm": arm, "seed": seed, **each})


def test_differences_are_paired_by_sentence_and_by_seed(tmp_path):
    hard = [10.0 * 2**i for i in range(8)]  # sentences that differ far more than arms do
    write_sentences(tmp_path, {
        ("lora-4", 0): hard, ("lora-4", 1): [x + 4 for x in hard], ("lora-4", 2): [9.0] * 8,
        ("ours-4", 0): [x - 1 for x in hard], ("ours-4", 1): [x + 1 for x in hard],
    })  # fmt: skip
    nats, words = decoder.read_sentences(tmp_path)
    gap, (low, high) = decoder.gap_by_sentence(nats, words, "ours-4", "lora-4")
    assert (gap, low, high) == pytest.approx((-0.2, -0.2, -0.2)), "-1 and -3 of ten words; seed 2 is not of both"
    assert decoder.gaps_by_seed(nats, words, "ours-4", "lora-4") == pytest.approx([-0.1, -0.3])


def test_intervals_over_sentences_weigh_sentences_by_their_words():
    ours, lora, words = torch.tensor([[1.0, 30.0], [3.0, 20.0], [2.0, 20.0]], dtype=torch.float64)
    gap, (low, high) = decoder.gap_by_sentence({"ours-4": {0: ours}, "lora-4": {0: lora}}, words, "ours-4", "lora-4")
    assert gap == pytest.approx(8 / 22) and (low, high) == pytest.approx((-1.0, 0.5)), "one of both sentences, twice"


def test_the_share_of_the_gap_that_is_closed_is_that_of_paired_runs(tmp_path, capsys):
    hard = [10.0 * 2**i for i in range(6)]
    runs = {(arm, seed): [x - less for x in hard] for seed in range(3)
            for arm, less in (("lora-8", 4), ("lora-4", 0), ("ours-4", 3), ("restart-8", 1))}  # fmt: skip
    write_sentences(tmp_path, runs)
    for arm, seed in runs:
        row = {"arm": arm, "seed": seed, "size": int(arm[-1]) / 8, "loss": 1.0}
        decoder.append(tmp_path / "decoder.csv", row)
    decoder.append(tmp_path / "decoder.csv", {"arm": "ours-4", "seed": 3, "size": 2.0, "loss": "inf"})
    decoder.main(["--report", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "diverged, and in no mean: ours-4 (seed 3)" in said and "2.0000" not in said
    closed = "ours-4 closes 0.75, over sentences [0.75, 0.75], over seeds [0.75, 0.75]"
    assert f"of the gap from lora-4 to lora-8, {closed}" in said and "restart-8 closes" not in said
    line = next(line for line in said.splitlines() if "ours-4 - lora-4" in line)
    interval = "[-0.3000, -0.3000]"
    assert line.split("  ")[-4:] == ["-0.3000", interval, interval, "below 0 in 3 of 3"]
    assert "ours-4 - lora-8" in said and "lora-4 - " not in said.replace("ours-4 - ", "")


def test_arms_that_this_study_cannot_train_are_refused(capsys):
    for name, words in (
        ("bitfit", "bitfit trains no triplets"),
        ("adapter-h-8", "adapter-h-8 trains no triplets"),
        ("alora-4", "alora-4 scores ranks on training rows"),
    ):
        with pytest.raises(SystemExit) as stopped:
            decoder.main(["--arms", name])
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_runs_that_held_out_other_sentences_are_not_compared(tmp_path, capsys):
    write_sentences(tmp_path, {("lora-4", 0): [1.0, 2.0], ("ours-4", 0): [1.0, 2.0, 3.0]})
    with pytest.raises(SystemExit):
        decoder.main(["--report", "--out", str(tmp_path)])
    assert "other sentences" in capsys.readouterr().err


# What goes wrong


@pytest.mark.parametrize(
    "more,part",
    [
        (["--model", "nowhere"], "no config.json in nowhere"),
        (["--data", "nowhere"], "no file nowhere"),
        (["--train", "empty"], "empty is empty"),
        (["--arms", "best-4"], "'best-4' is not METHOD-R"),
        (["--steps", "0"], "--steps"),
        (["--device", "warp"], "no device 'warp'"),
        (["--report"], "no runs in"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_status_2(more, part, tmp_path, flags, capsys):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SystemExit) as stopped:
        decoder.main([*flags, *more])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and part in said


def copied(source, target, *but):
    """A copy of a decoder's folder without some of its files."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*but))
    return target


def test_a_model_that_is_damaged_or_of_another_family_is_one_line(tmp_path, flags, tiny_decoder, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    other = copied(tiny_decoder, tmp_path / "gpt2", "model*", "config.json")
    transformers.GPT2LMHeadModel(config).save_pretrained(other)
    damaged = copied(tiny_decoder, tmp_path / "damaged", "model*")
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    half = copied(tiny_decoder, tmp_path / "half", "config.json")
    config = json.loads((tiny_decoder / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    bare = copied(tiny_decoder, tmp_path / "bare", "model*")
    for folder, part in (
        (other, "holds a GPT2LMHeadModel; expected the LLaMA family"),
        (damaged, "damaged cannot be loaded"),
        (half, "lacks weights of the model in config.json: model.layers.2."),
        (bare, "bare cannot be loaded"),
    ):
        capsys.readouterr()  # what transformers says while it writes a model
        with pytest.raises(SystemExit) as stopped:
            decoder.main([*flags, "--model", str(folder)])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and part in said and said.count("\n") == 1


def test_without_transformers_there_is_one_line(flags, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stopped:
        decoder.main(flags)
    assert stopped.value.code == 2 and "needs transformers: pip install -r req" in capsys.readouterr().err
