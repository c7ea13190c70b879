"""Real data with power: nobody trains on the rows that score, arms are compared in pairs, and "same" needs a test."""

import argparse
import json

import pytest
import torch

from experiments import intervals, real
from glue.tokens import MiniTokenizer
from salora import salora_layers
from tiny_transformer import SequenceClassifier, load_pretrained


@pytest.fixture
def small(monkeypatch, tmp_path, tiny_weights):
    """Sixty sentences of two classes, all different, in the place of the official files. Returns flags for a run."""
    words = MiniTokenizer().words[5:]
    rows = [(" ".join(words[i : i + 1 + i % 7]), None, i % 2) for i in range(60)]
    monkeypatch.setattr(real, "load_task", lambda task, folder: (rows, []))
    monkeypatch.setattr(real, "tokenizer_for", lambda folder, config, mini: MiniTokenizer())
    monkeypatch.setattr(real, "SPLIT", dict.fromkeys(real.SPLIT, (10, 20)))
    monkeypatch.setattr(real, "BATCH", 8)
    monkeypatch.setattr(real, "POOL", 16)
    return ["--data", "x", "--weights", str(tiny_weights), "--rows", "24", "--epochs", "1", "--out", str(tmp_path)]


def ids_of(rows):
    return {tuple(ids) for ids, _, _ in rows}


def test_rows_to_train_on_to_tune_on_and_to_score_are_different_rows(small, tiny_weights):
    one, two, tune = (real.data_of("sst2", "x", tiny_weights, seed, 24) for seed in (0, 1, real.TUNE_SEED))
    assert [len(some) for some in (one.train, one.test, tune.test)] == [24, 20, 10]
    assert one.test == two.test, "all seeds score the same rows"
    assert one.train != two.train
    trained = ids_of(one.train) | ids_of(two.train) | ids_of(tune.train)
    assert not trained & (ids_of(one.test) | ids_of(tune.test)) and not ids_of(one.test) & ids_of(tune.test)


def test_every_row_is_in_one_batch_of_every_epoch_and_little_is_padded(small, tiny_weights):
    data = real.data_of("cola", "x", tiny_weights, 0, 24)
    batches = real.batches_of(data.train, 3, 0)
    assert len(batches) == 9 and all(len(batch) == 8 for batch in batches)
    for epoch in range(3):
        seen = sorted(sum(batches[3 * epoch : 3 * epoch + 3], []))
        assert seen == sorted(data.train)
    assert batches != real.batches_of(data.train, 3, 1) and batches[:3] != batches[3:6]
    spread = max(len(row[0]) for row in batches[0]) - min(len(row[0]) for row in batches[1])
    assert spread <= 1, "the first pool of 16 is cut where it is sorted"


def test_score_and_loss_are_those_of_each_row_alone(small, tiny_weights, monkeypatch):
    monkeypatch.setattr(real, "BATCH", 2)  # scored in three batches
    data = real.data_of("cola", "x", tiny_weights, 0, 24)
    torch.manual_seed(3)
    model = SequenceClassifier(load_pretrained(tiny_weights)[0], 2).eval()
    metric, loss = real.score(model, data, real.nullcontext())
    with torch.no_grad():
        alone = [(model(torch.tensor([ids]), None, torch.tensor([types]))[0], label) for ids, types, label in data.test]
    gold = [label for _, label in alone]
    losses = [-logits.log_softmax(0)[label].item() for logits, label in alone]
    assert loss == pytest.approx(sum(losses) / 20, abs=1e-5)
    assert metric == pytest.approx(real.METRICS["matthews"]([int(z.argmax()) for z, _ in alone], gold))


def test_arms_are_tuned_apart_run_once_and_keep_to_their_size(small, tmp_path, capsys):
    arms = ["--arms", "lora-8", "lora-4", "narrow-4", "ours-4", "found-4", "shuffled-4", "--tasks", "cola"]
    with pytest.raises(SystemExit) as stop:
        real.main([*small, *arms, "--seeds", "0"])
    assert stop.value.code == 2 and "lora-8 has not been tuned on cola: run with --tune" in capsys.readouterr().err
    tuned = real.main([*small, *arms, "--tune", "--lr", "0.001", "0.01"])
    assert [(row["arm"], row["lr"]) for row in tuned] == [
        (arm, lr) for arm in ("lora-8", "lora-4", "narrow-4", "ours-4") for lr in ("0.001", "0.01")
    ]
    assert {row["seed"] for row in tuned} == {str(real.TUNE_SEED)}
    first, second = sorted((row for row in tuned if row["arm"] == "lora-4"), key=lambda row: -float(row["score"]))
    line = "cola, lora-4     " + ", ".join(f"{float(row['score']):.4f} ({row['lr']})" for row in (first, second))
    assert line in capsys.readouterr().out.splitlines()
    for seeds in (["0"], ["0", "1"]):
        rows = real.main([*small, *arms, "--seeds", *seeds])
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for seed in "01" for arm in arms[1:7]]
    assert all(float(row["size"]) <= (1 if row["arm"] == "lora-8" else 0.5) for row in rows)
    best = {arm: max((r for r in tuned if r["arm"] == arm), key=lambda r: float(r["score"]))["lr"] for arm in arms[1:5]}
    assert all(row["lr"] == best[row["arm"] if row["arm"] in best else "lora-4"] for row in rows)
    for seed in "01":
        ranks = {row["arm"]: json.loads(row["ranks"]) for row in rows if row["seed"] == seed}
        assert ranks["found-4"] == ranks["ours-4"] and sorted(ranks["shuffled-4"]) == sorted(ranks["ours-4"])


def test_found_ranks_need_the_run_that_found_them(small, tmp_path, capsys):
    real.main([*small, "--arms", "lora-4", "--tasks", "cola", "--tune", "--lr", "0.001"])
    with pytest.raises(SystemExit) as stop:
        real.main([*small, "--arms", "found-4", "--tasks", "cola", "--seeds", "0"])
    assert stop.value.code == 2 and "run that arm first" in capsys.readouterr().err


def test_given_ranks_are_those_of_the_model_that_trains(small, tiny_weights, monkeypatch):
    data, seen = real.data_of("cola", "x", tiny_weights, 0, 24), {}

    def fine_tune(model, batches, *rest, **more):
        seen["ranks"] = [layer.r for layer in salora_layers(model).values()]

    monkeypatch.setattr(real, "fine_tune", fine_tune)
    args = argparse.Namespace(weights=tiny_weights, epochs=1, precision="fp32")
    ranks = [i % 5 for i in range(12)]
    real.measure(data, "found-4", 1e-3, 0, args, ranks)
    assert seen["ranks"] == ranks


def test_a_run_that_diverges_is_a_row_with_an_infinite_loss(small, tiny_weights, monkeypatch):
    def fine_tune(*inputs, **more):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(real, "fine_tune", fine_tune)
    args = argparse.Namespace(weights=tiny_weights, epochs=1, precision="fp32")
    row = real.measure(real.data_of("cola", "x", tiny_weights, 0, 24), "lora-4", 1e9, 0, args)
    assert (row["score"], row["loss"]) == (0.0, float("inf"))


@pytest.mark.parametrize("gaps, verdict", [
    ([0.001, -0.001, 0.002, 0.0, 0.001], True),
    ([0.01, -0.01, 0.02, 0.0, -0.02], False),  # not different either
    ([0.006, 0.006, 0.006, 0.006, 0.006], False),
])  # fmt: skip
def test_same_is_said_only_where_the_90_percent_interval_is_within_half_a_point(gaps, verdict):
    rows = [
        {"task": "cola", "arm": arm, "seed": str(seed), "score": str(0.5 + gap * (arm == "ours-4")), "loss": "1"}
        for seed, gap in enumerate(gaps) for arm in ("lora-4", "ours-4")
    ]  # fmt: skip
    scores = real.report(rows).split("cola, loss")[0]
    [line] = [line for line in scores.splitlines() if "ours-4 - lora-4" in line]
    assert line.rstrip().endswith("same") == verdict


def test_the_mean_over_tasks_pairs_seeds_that_all_tasks_have():
    rows = [
        {"task": task, "arm": arm, "seed": seed, "score": str(value), "loss": "1"}
        for task, arm, seed, value in [
            ("cola", "lora-8", "0", 0.2), ("cola", "lora-8", "1", 0.4), ("cola", "lora-4", "0", 0.1),
            ("cola", "lora-4", "1", 0.2), ("mrpc", "lora-8", "0", 0.8), ("mrpc", "lora-8", "1", 0.8),
            ("mrpc", "lora-4", "0", 0.6), ("mrpc", "lora-4", "1", 0.5), ("mrpc", "lora-4", "2", 0.0),
        ]
    ]  # fmt: skip
    text = real.report(rows)
    assert "mean, score: lora-8 0.5500 (2), lora-4 0.3500 (2)" in text
    [line] = [line for line in text.split("mean, score")[1].splitlines() if "lora-4 - lora-8" in line][:1]
    assert line.split()[3] == "-0.2000"


def test_an_interval_of_another_level_is_narrower():
    values = [0.1, 0.5, 0.2, 0.9, 0.3]
    (low, high), (least, most) = intervals.interval(values), intervals.interval(values, 0.9)
    assert low < least < most < high
