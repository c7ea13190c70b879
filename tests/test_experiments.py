"""Planted ranks are found, and no experiment does the same run twice."""

import argparse
import copy
import csv
import json

import pytest
import torch
from strategies import installed_parameters, make_layer

import train_glue_mini
from experiments import (
    arms,
    compare,
    figures,
    instruct,
    intervals,
    ladder,
    methods,
    planted_ranks,
    plots,
    recipe,
    shift,
    transplant,
)
from glue.tasks import load_task
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
    assert row[1:4] == ["0.002*", "1,792", "1,792"] and row[8] == "2", "the default, and both seeds"


def test_generated_tasks_are_tuned_on_dev_rows_and_reported_on_rows_after_them(tmp_path, tiny_weights, monkeypatch):
    parts = [*load_task("mini-rte"), methods.fresh_rows("mini-rte")]
    rows = [row[:2] for part in parts for row in part]
    assert len(set(rows)) == len(rows) == 4000 + 1000 + methods.FRESH_ROWS

    monkeypatch.setattr(methods, "fresh_rows", lambda task: [("the dog", "the cat", 1)] * 8)
    flags = ["--weights", str(tiny_weights), "--rows", "32", "--steps", "4"]
    args = argparse.Namespace(flags=flags, steps=None, out=tmp_path)
    reported, *_ = methods.run("lora-4", "mini-rte", 0, (0.002, ""), args)
    tuned, *_ = methods.run("lora-4", "mini-rte", arms.TUNE_SEED, (0.002, ""), args)
    assert reported in (0, 1), "all fresh rows are alike here"
    assert 0.2 < tuned < 0.8, "dev rows have both labels"


def compared(scores, tuned="yes"):
    """Rows of compare.csv for {(method, task, seed): score}."""
    same = {"trained": 2000, "final": 1000, "trial": "0.002", "tuned": tuned, "seconds_per_step": 0.5}
    return [{"method": m, "task": task, "seed": seed, "score": x, **same} for (m, task, seed), x in scores.items()]


def test_comparison_table_averages_only_seeds_that_have_run_on_every_task():
    rows = compared({("a", "mini-cola", "0"): 0.5, ("a", "mini-rte", "0"): 0.7, ("a", "mini-cola", "1"): 0.9})
    head, line = (line.split() for line in compare.table(rows).splitlines())
    assert line == "a 0.002 2,000 1,000 0.700 0.700 0.6000 - 1 0.5000 -".split()
    assert head[:5] == ["trial", "trained", "final", "cola", "rte"] and head[-1] == "MiB"


def test_comparison_table_has_intervals_over_seeds_memory_and_a_mark_for_what_was_not_tuned():
    means = [0.5, 0.6, 0.9, 0.7, 0.8]  # of three seeds, the interval is the range
    rows = compared({("a", "mini-cola", str(seed)): score for seed, score in enumerate(means)}, tuned="no")
    memory = [{"method": "a", "task": "mini-cola", "device": "cpu", "MiB": "321.5"}]
    _, line, note = compare.table(rows, memory).splitlines()
    low, high = intervals.interval(means)
    assert f"0.7000   [{low:.4f}, {high:.4f}]" in line and line.split()[-1] == "321.5"
    assert "0.002*" in line and note == "*: the default, not tuned"


@pytest.fixture
def fake_runs(monkeypatch):
    """No training: a run's score is its learning rate. Returns the calls, (method, task, seed, trial, data)."""
    asked = []

    def run(method, task, seed, trial, args):
        asked.append((method, task, seed, trial, args.data))
        if method == "full" and trial[0] == max(lr for lr, _ in methods.trials(method, task)):
            raise FloatingPointError("the loss is nan at step 1, not finite")
        return trial[0], 20, 10, 0.5, "cpu"

    monkeypatch.setattr(compare, "run", run)
    return asked


TRIALS = {"mini-cola": 5, "words": 10, "cola": 3}


@pytest.mark.parametrize("task", TRIALS)
def test_every_method_of_the_comparison_gets_as_many_trials(task):
    found = {method: methods.trials(method, task) for method in methods.METHODS}
    assert {len(set(trials)) for trials in found.values()} == {TRIALS[task]}
    assert all(task == "words" or methods.default_trial(method, task) in trials for method, trials in found.items())


def test_tuning_has_a_seed_of_its_own_and_reports_take_its_best_trial(tmp_path, fake_runs, capsys):
    flags = ["--methods", "lora-4", "full", "--tasks", "mini-cola", "mini-rte", "--out", str(tmp_path)]
    rows = compare.main(["--tune", *flags])
    assert len(rows) == len(fake_runs) == 2 * 2 * 5 and {seed for _, _, seed, *_ in fake_runs} == {arms.TUNE_SEED}
    assert compare.main(["--tune", *flags]) == rows and len(fake_runs) == 20, "what is there is not done again"
    rows = compare.main(["--seeds", "0", *flags])
    trials = {(method, trial) for method, _, seed, trial, _ in fake_runs if seed == 0}
    assert trials == {("lora-4", (0.016, "")), ("full", (2e-3, ""))}, "the highest score; a diverged trial is the worst"
    assert {(row["trial"], row["tuned"]) for row in rows} == {("0.016", "yes"), ("0.002", "yes")}
    with pytest.raises(SystemExit):
        compare.main(["--seeds", "0", str(arms.TUNE_SEED), *flags])
    assert "is the seed for tuning" in capsys.readouterr().err


def test_the_best_trial_of_a_shift_has_the_lowest_loss_over_all_kinds(tmp_path, fake_runs):
    flags = ["--methods", "lora-4", "full", "bitfit", "--tasks", "words", "reverse", "--out", str(tmp_path)]
    compare.main(["--tune", *flags])
    compare.main(["--seeds", "0", *flags])
    trials = {method: trial for method, _, seed, trial, _ in fake_runs if seed == 0}
    lowest = {method: min(lr for lr, _ in methods.trials(method, "words")) for method in trials}
    assert {method: lr for method, (lr, _) in trials.items()} == lowest
    compare.append(tmp_path / "tune.csv", {"method": "lora-4", "task": "words", "lr": 1e-9, "scale": 1.0, "seed": 100,
                                           "score": 0.0, "final": 1})  # fmt: skip
    best = compare.ranking(compare.read_table(tmp_path / "tune.csv"), "lora-4", "shift")[0]
    assert best[1][0] == lowest["lora-4"], "a trial that lacks a task does not count"


def test_a_diverged_run_has_no_row_in_a_report(tmp_path, fake_runs, capsys, monkeypatch):
    monkeypatch.setattr(compare, "default_trial", lambda method, task: methods.trials(method, task)[-1])
    flags = ["--methods", "full", "lora-4", "--tasks", "mini-cola", "--seeds", "0", "--out", str(tmp_path)]
    assert [row["method"] for row in compare.main(flags)] == ["lora-4"]
    assert "full, mini-cola, seed 0: the loss is nan" in capsys.readouterr().out


GLUE_ROWS = {
    "CoLA": ("", "src\t{label}\t*\tsentence {i}"),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n", "{label}\t1\t2\tsentence {i}\tother {i}"),
}


@pytest.fixture
def glue(tmp_path):
    """A folder in GLUE's layout: 25 training rows and 5 dev rows, all of them different."""
    for folder, (header, row) in GLUE_ROWS.items():
        (tmp_path / "glue" / folder).mkdir(parents=True)
        for name, numbers in (("train.tsv", range(25)), ("dev.tsv", range(100, 105))):
            text = header + "".join(row.format(i=i, label=i % 2) + "\n" for i in numbers)
            (tmp_path / "glue" / folder / name).write_text(text)
    return tmp_path / "glue"


def test_official_tasks_are_tuned_on_held_out_training_rows_and_never_on_dev_rows(tmp_path, glue, fake_runs):
    flags = ["--methods", "lora-4", "--tasks", "cola", "mrpc", "--data", str(glue), "--out", str(tmp_path / "out")]
    compare.main(["--tune", *flags])
    [folder] = {data for *_, data in fake_runs}
    for task in ("cola", "mrpc"):
        train, dev = load_task(task, glue)
        tuning_train, tuning_dev = load_task(task, folder)
        assert sorted(tuning_train + tuning_dev) == sorted(train) and len(tuning_dev) == 3
        assert not set(tuning_dev) & set(tuning_train) and not set(dev) & set(tuning_train + tuning_dev)
    compare.main(["--seeds", "0", *flags])
    assert {data for _, _, seed, _, data in fake_runs if seed == 0} == {glue}, "reports read the official files"


def test_tasks_of_different_kinds_and_official_ones_without_data_are_refused(capsys, tmp_path):
    for tasks, said in ((["mini-cola", "words"], "not of one kind"), (["cola"], "official tasks need --data DIR")):
        with pytest.raises(SystemExit):
            compare.main(["--tasks", *tasks, "--out", str(tmp_path)])
        assert said in capsys.readouterr().err


def test_memory_is_measured_once_for_every_method_before_anything_is_scored(tmp_path, tiny_weights, monkeypatch):
    monkeypatch.setattr(compare.cost, "in_processes", lambda function, calls: [function(*call) for call in calls])
    said = []
    monkeypatch.setattr(compare.cost, "peak_of_process", lambda device: said.append(device) or 100.0)
    predict = train_glue_mini.predict
    monkeypatch.setattr(train_glue_mini, "predict", lambda *rest: said.append("scored") or predict(*rest))
    flags = ["--memory", "--methods", "lora-4", "ia3", "--tasks", "mini-rte", "mini-cola", "--out", str(tmp_path)]
    flags += ["--weights", str(tiny_weights), "--rows", "32", "--batch-size", "8"]
    rows = compare.main(flags)
    assert [(row["method"], row["task"]) for row in rows] == [("lora-4", "mini-rte"), ("ia3", "mini-rte")]
    assert all(row["MiB"] == "100.0" for row in rows) and said == ["cpu", "scored"] * 2
    assert compare.main(flags) == rows and len(said) == 4, "what is there is not done again"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tasks", "words", "--precision", "bf16"], "--precision: on a shift no flag goes to the main job"),
        (["--tasks", "mini-cola", "--lr=1"], "--lr is what this study chooses itself"),
    ],
)
def test_flags_that_would_change_nothing_are_refused(tmp_path, capsys, fake_runs, flags, words):
    with pytest.raises(SystemExit) as stopped:
        compare.main([*flags, "--out", str(tmp_path)])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_tasks_of_another_kind_in_the_same_folder_are_not_averaged(tmp_path, capsys):
    for row in compared({("lora-4", "mini-cola", 0): 0.9, ("lora-4", "words", 0): 1.7}):
        compare.append(tmp_path / "compare.csv", row)
    compare.main(["--methods", "lora-4", "--tasks", "mini-cola", "--seeds", "0", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "0.9000" in said and "words" not in said


def test_an_interruption_of_a_run_is_one_of_the_study(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise SystemExit(130)

    monkeypatch.setattr(train_glue_mini, "main", interrupted)
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--methods", "lora-4", "--tasks", "mini-cola", "--out", str(tmp_path)])
    assert stopped.value.code == 130 and "the same command goes on" in capsys.readouterr().err


STUDIES = {  # program -> (what a run of it begins with, flags)
    planted_ranks: ("learn", []),
    ladder: ("climb", []),
    transplant: ("found_ranks", ["--kinds", "words", "--texts", "64"]),
    recipe: ("one", []),
    shift: ("data_of", ["--kinds", "words"]),
    instruct: ("compare", []),
}


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.__name__)
@pytest.mark.parametrize("error, status, said", [
    (KeyboardInterrupt(), 130, "the same command goes on"),
    (FloatingPointError("the loss is nan"), 2, "the loss is nan"),
])  # fmt: skip
def test_a_study_that_is_stopped_ends_with_one_line(study, error, status, said, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise error

    name, flags = STUDIES[study]
    monkeypatch.setattr(study, name, stopped)
    monkeypatch.setattr(instruct, "mini_decoder", lambda: None)
    with pytest.raises(SystemExit) as ended:
        study.main([*flags, "--out", str(tmp_path)])
    assert ended.value.code == status and said in capsys.readouterr().err


@pytest.mark.parametrize("study", [*STUDIES, compare], ids=lambda study: study.__name__)
def test_a_file_in_the_place_of_a_studys_folder_is_one_line(study, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(SystemExit) as ended:
            study.main(["--out", str(out)])
        assert ended.value.code == 2 and f"{out} is a file, or inside of one" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_report_is_about_the_seeds_and_tasks_that_are_asked_for(tmp_path, fake_runs, capsys):
    flags = ["--methods", "lora-4", "--tasks", "mini-cola", "--out", str(tmp_path)]
    compare.main([*flags, "--seeds", "0", "1"])
    assert [row["seed"] for row in compare.main([*flags, "--seeds", "1", "2"])] == ["1", "2"]
    compare.append(tmp_path / "memory.csv", {"method": "lora-4", "task": "words", "device": "cpu", "MiB": 77.0})
    compare.main([*flags, "--seeds", "0"])
    assert "77.0" not in capsys.readouterr().out, "the memory of another kind of task"


def test_what_the_main_job_says_is_raised_without_its_name(tmp_path):
    with pytest.raises(ValueError, match="^argument --rank: expected a whole number above 0"):
        methods.main_job(["--rank", "0", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("lower", [False, True])
def test_names_in_the_picture_cover_neither_marks_nor_each_other(tmp_path, monkeypatch, lower):
    found, place = [], plots.place_names
    monkeypatch.setattr(plots, "place_names", lambda *arguments: found.extend(place(*arguments)))
    sizes = [900 + 60 * i for i in range(13)] + [20_000]
    points = [(method, size, 0.9 + i % 3 / 1000, 0.001, 0.001)
              for i, (method, size) in enumerate(zip(plots.METHODS, sizes)) if method != "lora-4"]  # fmt: skip
    plots.methods([*points, ("head", 0, 0.8, 0, 0)], "score", lower, tmp_path / "all.png")
    assert len(found) == len(points), "one panel, every name in it"
    assert not any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])
    found.clear()
    plots.methods([*points, ("lora-4", 1500, 0.9, 0, 0)], "score", lower, tmp_path / "alike.png")
    assert 1 < len(found) < len(points), "those of the size of LoRA r = 4 have a panel to themselves"


def test_table_1_is_what_the_comparison_found(tmp_path, capsys):
    scores = {("salora", "mini-cola", 0): 0.5, ("salora", "mini-cola", 1): 0.7, ("salora", "mini-rte", 0): 0.8,
              ("ia3", "mini-cola", 0): 0.4}  # fmt: skip
    for row in compared(scores):
        compare.append(tmp_path / "compare.csv", row)
    for _ in range(2):
        rows = figures.main(["table1", "--from", str(tmp_path), "--out", str(tmp_path)])
    salora = {"method": "salora", "mini-cola": "0.6", "mini-rte": "0.8", "mean": "0.7"}
    assert rows == [salora, {"method": "ia3", "mini-cola": "0.4", "mini-rte": "", "mean": ""}]
    assert (tmp_path / "table1.png").stat().st_size > 5000
    capsys.readouterr()
    with pytest.raises(SystemExit):
        figures.main(["table1", "--from", str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    assert "run experiments/compare.py first" in capsys.readouterr().err


def test_methods_of_the_comparison_are_the_peers_and_their_rivals():
    rivals = {"salora", "salora-16", "lora-8", "lora-4", "full", "head"}
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
    rows = shift.main(["--report", *tiny_lm])
    assert (tmp_path / "out" / "shift.csv").read_bytes() == before, "a report runs nothing"
    assert (tmp_path / "out" / "shift.png").stat().st_size > 5000
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


D, M, LAYERS, WORDS, PLACES = 16, 32, 2, 130, 48  # of the small masked LM
LORA_1 = LAYERS * (4 * 2 * D + 2 * (D + M))
BLOCK = 4 * (D * D + D) + 2 * D * M + M + D + 2 * 2 * D
CLOSED_FORMS = {
    "lora-4": 4 * LORA_1,
    "adapter-h-5": installed_parameters("adapter-h", 5, LAYERS, D, M),
    "adapter-p-5": installed_parameters("adapter-p", 5, LAYERS, D, M),
    "prefix-3": installed_parameters("prefix", 3, LAYERS, D, M),
    "prompt-3": installed_parameters("prompt", 3, LAYERS, D, M),
    "bitfit": installed_parameters("bitfit", 0, LAYERS, D, M),
    "ia3": installed_parameters("ia3", 0, LAYERS, D, M),
    "full": LAYERS * BLOCK + (WORDS + PLACES + 2) * D + 2 * D,
    "head": 0,
}


def test_every_arm_of_the_shift_study_has_the_size_of_its_closed_form(tiny_lm):
    rows = shift.main(["--kinds", "words", "--arms", *CLOSED_FORMS, "--seeds", "0", *tiny_lm])
    assert {row["arm"]: float(row["size"]) for row in rows} == {
        name: round(count / (8 * LORA_1), 4) for name, count in CLOSED_FORMS.items()
    }
    assert len({row["loss"] for row in rows}) == len(rows)
    assert "adapter-h-5 - lora-4" in shift.report([{**row, "seed": seed} for row in rows for seed in "01"])


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_only_one_arm_trains_the_head_of_the_masked_lm(name, tiny_lm):
    model = shift.model_of(arms.arm_of(name), 1, 0)
    assert {p.requires_grad for p in model.lm_head.parameters()} == {name == "head"}
    assert sum(p.numel() for p in model.encoder.parameters() if p.requires_grad) == CLOSED_FORMS[name]


def test_alora_scores_ranks_on_training_texts_that_it_does_not_train_on(tiny_lm, monkeypatch):
    data, arm, seen, scored = shift.Data("words", 0, 96), arms.arm_of("alora-4"), [], []
    batch_of, score_on = data.batch_of, shift.score_on

    def look(batches, data, model):
        scored.extend(batches)
        score = score_on(batches, data, model)
        assert score() == score() < 0 and model.training, "the same words are hidden every time"
        return score

    monkeypatch.setattr(shift, "score_on", look)
    monkeypatch.setattr(data, "batch_of", lambda batches, *rest: seen.extend(batches) or batch_of(batches, *rest))
    model = shift.model_of(arm, 2, 0)
    shift.train(model, data, arm, 0.01, 0, 8)
    assert len(scored) == 1 and scored[0] in data.train and scored[0] not in seen[1:]
    assert {tuple(map(str, batch)) for batch in seen[1:]} == {tuple(map(str, b)) for b in data.train[:-1]}
    assert sum(shift.ranks_of(model)) == 4 * 6 * LAYERS


def test_a_run_of_alora_does_not_depend_on_what_ran_before_it(tiny_lm, monkeypatch):
    data, hidden = shift.Data("words", 0, 96), []
    score_on = shift.score_on

    def look(batches, data, model):
        state = data.generator.get_state()
        hidden.append(data.batch_of(batches)[1])
        data.generator.set_state(state)
        return score_on(batches, data, model)

    monkeypatch.setattr(shift, "score_on", look)
    for before in (0, 3):
        for _ in range(before):
            data.batch_of(data.train[:1])
        shift.train(shift.model_of(arms.arm_of("alora-4"), 2, 0), data, arms.arm_of("alora-4"), 0.01, 0, 2)
    assert torch.equal(*hidden), "the same words are hidden for its scores"


def test_grids_have_as_many_trials_for_every_arm():
    some = [arms.arm_of(name) for name in ("lora-4", *CLOSED_FORMS)]
    assert len(arms.GRID) == 6 and set(arms.GRID) < set(arms.WIDE)
    assert {len(set(arms.grid_of(arm, arms.WIDE))) for arm in some} == {10}
    assert all(arms.tuned(arm) in arms.grid_of(arm, arms.GRID) for arm in some)


def test_shift_study_tunes_on_a_grid_with_a_seed_of_its_own(monkeypatch, tiny_lm):
    monkeypatch.setattr(shift, "GRID", arms.GRID[:2])
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
    share, (low, high) = intervals.share_closed([2.0, 3.0], [1.0, 2.0], [1.25, 2.25])
    assert share == pytest.approx(0.75) and low == pytest.approx(0.75) and high == pytest.approx(0.75)
    low, high = intervals.interval([0.0, 1.0])
    assert (low, high) == (0, 1)


def test_a_report_without_lora_8_has_tables_and_no_picture(tmp_path, capsys):
    for arm in ("lora-4", "ours-4"):
        shift.append(tmp_path / "shift.csv", {"kind": "words", "arm": arm, "size": 0.5, "seed": 0, "loss": 1.5})
    shift.main(["--report", "--out", str(tmp_path)])
    assert "ours-4" in capsys.readouterr().out and not (tmp_path / "shift.png").exists()


def test_an_arm_that_means_nothing_is_one_line(capsys, tiny_lm):
    for name in ("ours", "lora-.5", "ours-17", "best-4", "bitfit-4", "adapter-h"):
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
