"""Planted ranks are found, and no experiment does the same run twice."""

import copy
import csv
import json

import pytest
import torch
from strategies import make_layer

from experiments import compare, planted_ranks, recipe
from peers import PEERS


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
