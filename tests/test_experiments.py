"""Planted ranks are found, and no experiment does the same run twice."""

import copy
import csv
import json

import pytest
import torch
from strategies import make_layer

from experiments import compare, free_gates, planted_ranks, recipe, shift, transplant
from peers import PEERS
from tiny_transformer import MaskedLM, TinyTransformer, load_pretrained, save_pretrained


def test_planted_ranks_are_found(tmp_path, capsys):
    """16 maps of 32 x 32 with updates of rank 0 to 8 and noisy outputs: each learned rank is the planted one."""
    flags = ["--quick", "--steps", "600", "--methods", "ours", "--out", str(tmp_path)]
    [row] = planted_ranks.main(flags)
    assert float(row["right"]) == 1 and row["learned"] == row["planted"], "every matrix gets the rank it deserves"
    assert float(row["share"]) == 1 and float(row["loss"]) < 0.001, "within the budget, and the teacher is matched"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank.csv", "bank.png"]
    assert row["steps"] == "600"
    before = (tmp_path / "bank.csv").read_bytes()
    planted_ranks.main(flags)
    assert (tmp_path / "bank.csv").read_bytes() == before, "what is there is not done again"
    assert "100.0%" in capsys.readouterr().out


def test_what_salora_is_compared_with_keeps_to_the_same_budget(tmp_path):
    rows = planted_ranks.main(["--quick", "--steps", "20", "--methods", "svd", "uniform", "--out", str(tmp_path)])
    assert [row["method"] for row in rows] == ["svd", "uniform"]
    svd, uniform = (json.loads(row["learned"]) for row in rows)
    needed = sum(json.loads(rows[0]["planted"]))
    assert sum(svd) == needed, "triplets of equal cost: the cut spends the whole budget"
    assert uniform == [needed // 16] * 16, "one rank for all 16 matrices, the largest that fits"


def test_a_cut_by_svd_keeps_the_largest_singular_values_of_all_layers():
    layers = [make_layer(6, 5, 4, seed=i, dtype=torch.float32) for i in range(3)]
    values = [torch.linalg.svdvals(layer.B @ layer.A)[:4].tolist() for layer in layers]
    sixth = sorted(sum(values, []), reverse=True)[5]
    planted_ranks.cut_by_svd(layers, 0.5)
    assert [layer.r for layer in layers] == [sum(value >= sixth for value in some) for some in values]


def test_planted_updates_have_the_ranks_that_are_said(monkeypatch, tiny_weights):
    monkeypatch.setattr(planted_ranks, "mini_encoder", lambda: tiny_weights)
    network, targets, inputs = planted_ranks.transformer(0, 4)
    teacher = copy.deepcopy(network)
    ranks = planted_ranks.plant(teacher, targets, torch.Generator().manual_seed(0))
    assert len(ranks) == 12 and not torch.equal(teacher(inputs), network(inputs))
    for name, layer in planted_ranks.salora_layers(teacher).items():
        values = torch.linalg.svdvals(layer.delta())
        assert int((values > 0.4).sum()) == int((values > 1e-4).sum()) == ranks[name]


@pytest.mark.parametrize("variants", [["ours", "lora-8"], ["head"]])
def test_recipe_study_adds_rows_and_does_none_twice(tmp_path, capsys, tiny_weights, monkeypatch, variants):
    monkeypatch.chdir(tmp_path)
    flags = ["--weights", str(tiny_weights), "--rows", "32", "--batch-size", "8", "--out", str(tmp_path / "out")]
    for seeds in (["0"], ["0", "1"]):
        rows = recipe.main(["--tasks", "mini-sst2", "--seeds", *seeds, "--variants", *variants, "--steps", "6", *flags])
    assert [(row["variant"], row["seed"]) for row in rows] == [(v, s) for s in "01" for v in variants]
    with open(tmp_path / "out" / "recipe.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(variants)
    assert (tmp_path / "out" / "recipe.png").stat().st_size > 5000
    assert ("- lora-8" in capsys.readouterr().out) == ("lora-8" in variants)


def test_a_quick_recipe_study_is_one_task_one_seed_and_a_hundred_steps(tmp_path, monkeypatch):
    asked = []

    def one(variant, task, seed, flags, out):
        asked.append((variant, task, seed, flags))
        values = dict.fromkeys(recipe.COLUMNS[3:], 0.5)
        return {"variant": variant, "task": task, "seed": seed, **values}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "one", one)
    recipe.main(["--quick", "--variants", "lora-8", "--rank", "4"])
    assert asked == [("lora-8", "mini-cola", 0, ["--rank", "4", "--steps", "100"])], "other flags go to the main job"
    assert (tmp_path / "runs" / "recipe-quick" / "recipe.csv").is_file()


def test_recipe_table_compares_with_every_lora_over_the_seeds_of_both():
    scores = {"ours": [0.9, 0.8, 0.7], "lora-8": [0.8, 0.5], "lora-4": [0.6]}
    rows = [
        {"variant": v, "task": task, "seed": str(s), "score": x, "density_kept": "0.5", "density_expected": "0.5"}
        for v, some in scores.items() for s, x in enumerate(some) for task in ("mini-cola", "mini-rte")
    ]  # fmt: skip
    head, ours, lora, *_ = recipe.table(rows).splitlines()
    assert head.split()[:9] == "cola rte mean - lora-8 +- s.e. - lora-4".split()
    assert ours.split()[:8] == "ours 0.8000 0.8000 0.8000 +0.2000 0.1000 +0.3000 -".split()
    assert lora.split()[4:6] == ["+0.0000", "0.0000"]


def test_spare_room_is_counted_in_the_cheapest_triplets(tmp_path, tiny_weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--weights", str(tiny_weights), "--rows", "16", "--steps", "4"]
    row = recipe.one("ours", "mini-cola", 0, flags, str(tmp_path / "run"))
    assert 0 <= row["spare"] < 1, "the budget rule leaves no room for another triplet"
    assert row["spare"] == pytest.approx((row["density_target"] - row["density_kept"]) * 3584 / 32)


def test_groups_name_variants_that_exist():
    assert all(name in recipe.VARIANTS for group in recipe.GROUPS.values() for name in group)


def test_comparison_adds_rows_with_sizes_and_does_none_twice(tmp_path, capsys, tiny_weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--weights", str(tiny_weights), "--rows", "32", "--batch-size", "8", "--steps", "6"]
    methods = ["salora", "lora-4", "ia3", "head"]
    for seeds in (["0"], ["0", "1"]):
        out = ["--tasks", "mini-sst2", "--seeds", *seeds, "--out", str(tmp_path / "out")]
        rows = compare.main(["--methods", *methods, *out, *flags])
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for s in "01" for m in methods]
    found = {row["method"]: (int(row["trained"]), int(row["final"])) for row in rows}
    assert found["lora-4"] == (1792, 1792) and found["ia3"] == (128, 128) and found["head"] == (0, 0)
    assert found["salora"][0] == 3584 and 1792 - 48 < found["salora"][1] <= 1792
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("salora, mini-sst2, seed") for line in lines) == 2
    [row] = [line.split() for line in lines[-8:] if line.startswith("lora-4 ")]
    assert row[1:3] == ["1,792", "1,792"] and row[6] == "2", "both seeds"


def test_comparison_table_averages_only_seeds_that_have_run_on_every_task():
    scores = {("a", "mini-cola", "0"): 0.5, ("a", "mini-rte", "0"): 0.7, ("a", "mini-cola", "1"): 0.9}
    rows = [
        {"method": m, "task": task, "seed": seed, "score": x, "trained": 2000, "final": 1000, "seconds_per_step": 0.5}
        for (m, task, seed), x in scores.items()
    ]
    assert compare.table(rows).splitlines()[1].split() == "a 2,000 1,000 0.700 0.700 0.6000 - 1 0.5000".split()


def test_methods_of_the_comparison_are_the_peers_and_their_rivals():
    rivals = {"salora", "lora-8", "lora-4", "full", "head"}
    assert set(compare.METHODS) == rivals | set(PEERS)


def test_a_masked_lm_is_saved_with_its_head(tmp_path, tiny_weights):
    lm = MaskedLM(load_pretrained(tiny_weights)[0])
    save_pretrained(lm, tmp_path)
    again, _ = load_pretrained(tmp_path, head=MaskedLM)
    assert isinstance(again.encoder, TinyTransformer)
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), again.parameters(), strict=True))


def test_shift_study_adds_rows_and_does_none_twice(tmp_path, tiny_lm):
    arms = ["lora-8", "restart-4", "ours-4", "svd-4", "paper-4", "lora-1", "ours-1", "ours-.5"]
    for seeds in (["0"], ["0", "1"]):
        rows = shift.main(["--kinds", "words", "chance", "--arms", *arms, "--seeds", *seeds, *tiny_lm])
    assert list(rows[0]) == ["kind", "arm", "size", "seed", "loss"]
    keys = [(row["seed"], row["kind"], row["arm"]) for row in rows]
    assert keys == [(seed, kind, arm) for seed in "01" for kind in ("words", "chance") for arm in arms]
    before = (tmp_path / "out" / "shift.csv").read_bytes()
    rows = shift.main(["--report", "--picture", str(tmp_path / "shift.png"), *tiny_lm])
    assert (tmp_path / "out" / "shift.csv").read_bytes() == before, "a report runs nothing"
    assert (tmp_path / "shift.png").stat().st_size > 5000
    for row in rows:
        size = float(row["arm"].rpartition("-")[2]) / 8
        slack = 0 if row["arm"].startswith(("lora", "restart")) else 0.02  # less than a triplet of this small model
        if row["arm"] != "paper-4":  # which keeps what its median gates say
            assert size - slack <= float(row["size"]) <= size + 1e-4, row


def test_peers_run_in_the_shift_study(tiny_lm):
    arms = ["adalora-4", "rm-lora-4", "sora-8"]
    rows = shift.main(["--kinds", "words", "--arms", *arms, "--seeds", "0", *tiny_lm])
    sizes = [float(row["size"]) for row in rows]
    assert sizes[0] <= 0.6 and sizes[1] == 0.5 and 0 < sizes[2] <= 1, "AdaLoRA counts triplets, which differ in size"
    assert len({row["loss"] for row in rows}) == 3
    with pytest.raises(SystemExit):
        shift.main(["--arms", "adalora-9", *tiny_lm])


def test_shift_study_tunes_on_a_grid_with_a_seed_of_its_own(monkeypatch, tiny_lm):
    monkeypatch.setattr(shift, "GRID", shift.GRID[:2])
    rows = shift.main(["--tune", "--kinds", "words", "--arms", "lora-4", "ours-4", *tiny_lm])
    assert len(rows) == 2 * 2 and {row["seed"] for row in rows} == {"100"}
    assert {"lr", "scale", "loss"} <= set(rows[0])
    assert shift.main(["--tune", "--kinds", "words", "--arms", "lora-4", "ours-4", *tiny_lm]) == rows


def test_shifts_are_permutations_of_the_words(capsys):
    texts = shift.mini.corpus(200, "test")
    for kind, shifted in shift.KINDS.items():
        new = shifted(texts, shift.random.Random(0))
        pairs = {(a, b) for old, text in zip(texts, new) if kind != "reverse" for a, b in words_of(old, text)}
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs), "one word for each word"
        assert (new == texts) == (kind == "chance")
    assert shift.reverse(texts, shift.random.Random(0))[0][0].startswith((".", "?"))


def words_of(old, new):
    return [pair for a, b in zip(old, new) if a for pair in zip(a.split(), b.split(), strict=True)]


def test_share_closed_and_intervals_are_those_of_paired_seeds():
    share, (low, high) = shift.share_closed([2.0, 3.0], [1.0, 2.0], [1.25, 2.25])
    assert share == pytest.approx(0.75) and low == pytest.approx(0.75) and high == pytest.approx(0.75)
    low, high = shift.interval([0.0, 1.0])
    assert (low, high) == (0, 1)


def test_an_arm_that_means_nothing_is_one_line(capsys, tiny_lm):
    for name in ("ours", "lora-.5", "ours-17", "best-4"):
        with pytest.raises(SystemExit):
            shift.main(["--arms", name, *tiny_lm])
        assert f"{name!r} is not METHOD-R" in capsys.readouterr().err


def test_transplanted_ranks_keep_the_size(tmp_path, tiny_lm, capsys):
    flags = ["--kinds", "words", "--seeds", "0", "1", *tiny_lm]
    rows = transplant.main(flags)
    assert [row["placement"] for row in rows] == 2 * transplant.PLACEMENTS
    ranks = [transplant.json.loads(row["ranks"]) for row in rows]
    assert sorted(ranks[0]) == sorted(ranks[1]) and set(ranks[2]) == {4}
    assert rows[0]["size"] == rows[1]["size"] and float(rows[2]["size"]) == 0.5
    assert transplant.main(flags) == rows, "what is there is not done again"
    assert "found - shuffled" in capsys.readouterr().out


def test_free_gates_learn_while_lambda_stays_0(tmp_path, capsys, tiny_weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--weights", str(tiny_weights), "--rows", "32", "--batch-size", "8", "--steps", "20", "--out", "out"]
    for _ in range(2):
        rows = free_gates.main(["--tasks", "mini-sst2", "--seeds", "0", "--gate-lr", "1", *flags])
    [row] = rows
    assert float(row["C"]) != pytest.approx(11 / 12, abs=1e-3), "log_theta has moved"
    assert capsys.readouterr().out.count("mini-sst2, seed 0, gate lr 1: C ") == 1, "it is not run again"
    lagrangian = free_gates.FreeGates(*loop_parts()).lagrangian
    lagrangian(torch.tensor(1.0)).backward()
    lagrangian.ascend()
    assert lagrangian.lam.item() == 0


def loop_parts():
    """A model with one layer, its optimizer, and a number of steps."""
    layer = make_layer(4, 3, 2, seed=0)
    model = torch.nn.Sequential(layer)
    return model, torch.optim.AdamW([layer.A, layer.B]), 10
