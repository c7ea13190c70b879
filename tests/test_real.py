"""Real data with power: nobody trains on the rows that score, and placed ranks are those of the run that found them."""

import json
from itertools import product

import pytest

from experiments import real
from experiments.study import TUNE_SEED
from glue.tokens import MiniTokenizer


@pytest.fixture
def flags(monkeypatch, tmp_path, tiny_weights):
    """Sixty sentences of two classes, all different, in the place of the official files. Returns flags of a run."""
    words = MiniTokenizer().words[5:]
    rows = [(" ".join(words[i : i + 1 + i % 7]), None, i % 2) for i in range(60)]
    monkeypatch.setattr(real, "load_task", lambda task, folder: (rows, []))
    monkeypatch.setattr(real, "tokenizer_for", lambda folder, config, mini: MiniTokenizer())
    monkeypatch.setattr(real, "SPLIT", dict.fromkeys(real.SPLIT, (10, 20)))
    monkeypatch.setattr(real, "BATCH", 8)
    monkeypatch.setattr(real, "POOL", 16)
    real.data_of.cache_clear()
    yield ["--data", "x", "--weights", str(tiny_weights), "--rows", "24", "--epochs", "1", "--tasks", "cola",
           "--out", str(tmp_path)]  # fmt: skip
    real.data_of.cache_clear()


def test_rows_to_train_on_to_tune_on_and_to_score_are_different_rows(flags, tiny_weights):
    parts = [real.data_of("sst2", "x", tiny_weights, seed, 24) for seed in (0, 1, TUNE_SEED)]
    (one, test), (two, same), (three, tune) = parts
    assert [len(some) for some in (one, test, tune)] == [24, 20, 10] and test == same and one != two
    trained, scored, tuned = ({tuple(ids) for ids, *_ in some} for some in (one + two + three, test, tune))
    assert not trained & (scored | tuned) and not scored & tuned


def test_every_row_is_in_one_batch_of_every_epoch_and_little_is_padded(flags, tiny_weights):
    rows, _ = real.data_of("cola", "x", tiny_weights, 0, 24)
    batches = real.batches_of(rows, 3, 0)
    assert len(batches) == 9 and {len(batch) for batch in batches} == {8}
    for epoch in range(3):
        assert sorted(sum(batches[3 * epoch : 3 * epoch + 3], [])) == sorted(rows)
    assert batches != real.batches_of(rows, 3, 1) and batches[:3] != batches[3:6]
    longest, shortest = (max(len(ids) for ids, *_ in batches[0]), min(len(ids) for ids, *_ in batches[1]))
    assert longest <= shortest, "the first pool of 16 is cut where it is sorted"


def test_placed_ranks_are_those_of_the_run_that_found_them(flags, tmp_path, capsys):
    arms = ["--arms", "lora-4", "salora-16-to-4", "lora-4-found", "lora-4-shuffled"]
    tuned = real.main([*flags, *arms, "--tune", "--grid", "0.001", "0.01"])
    for arm, rate in product(("lora-4", "salora-16-to-4"), ("0.001", "0.01")):
        assert [row["seed"] for row in tuned if (row["arm"], row["trial"]) == (arm, rate)] == ["100", "101", "102"]
    rows = {row["arm"]: row for row in real.main([*flags, *arms, "--seeds", "0"])}
    ranks = {name: json.loads(row["ranks"]) for name, row in rows.items()}
    assert ranks["lora-4-found"] == ranks["salora-16-to-4"]
    assert sorted(ranks["lora-4-shuffled"]) == sorted(ranks["salora-16-to-4"])
    assert all(float(row["size"]) <= 0.5 for row in rows.values())
    real.main([*flags, *arms, "--seeds", "1"])
    capsys.readouterr()
    real.main([*flags, "--report"])
    report = capsys.readouterr().out
    for pair in ("salora-16-to-4 - lora-4 ", "lora-4-found - lora-4-shuffled "):
        assert pair in report
    with pytest.raises(SystemExit) as stopped:
        real.main([*flags, "--arms", "lora-4-found", "--seeds", "2"])
    assert stopped.value.code == 2 and "run that arm first" in capsys.readouterr().err


@pytest.mark.parametrize("more, said", [
    (["--arms", "lora-4"], "lora-4 has not been tuned"),
    (["--data", ""], "a run needs --data and --weights"),
])  # fmt: skip
def test_what_cannot_be_run_is_one_line_and_exit_status_2(more, said, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        real.main([*flags, *more])
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and text.count("\n") == 1 and said in text
