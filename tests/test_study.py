"""The engine of the studies: no run is done twice, tuning keeps to itself, and what reports say is right."""

from argparse import ArgumentTypeError
from dataclasses import replace
from math import inf
from statistics import mean, stdev

import pytest
import torch
from matplotlib.figure import Figure
from strategies import row as row_of
from torch import nn

from cli.table import read_table
from experiments import tables
from experiments.arms import arm_of, nearest
from experiments.study import TUNE_SEED, Study, fit
from peers.adalora import mean_norm
from peers.alora import ALoRA
from peers.fixed_ranks import FixedRanks
from rank_allocator import Recipe
from salora import adapt, orthogonality

DIVERGES = 0.4  # a learning rate


class Runs:
    """What a study asks to be measured. The loss is ten times the distance of the learning rate from 0.2, on task b
    from 0.3, plus a hundredth of the seed."""

    def __init__(self):
        self.asked = []

    def __call__(self, args, task, arm, seed, trial):
        self.asked.append((task, arm.name, seed, *trial))
        if trial[0] == DIVERGES:
            raise FloatingPointError("the loss is nan at step 1, not finite")
        return {"loss": 10 * abs(trial[0] - {"a": 0.2, "b": 0.3}[task]) + seed / 100, "size": 0.5}


@pytest.fixture
def runs():
    return Runs()


@pytest.fixture
def study(runs):
    return Study(
        doc="Nothing is trained.",
        name="fake",
        measure=runs,
        columns=["loss", "size"],
        more=["size"],
        tasks=["a", "b"],
        arms=["lora-4", "salora-8-to-4"],
        seeds=range(2),
        steps=10,
        trials=lambda args, task, arm: [(0.1,), (0.2,), (0.35,), (DIVERGES,)],
        default=lambda args, task, arm: (0.1,),
        rivals=lambda name, names: [other for other in names if other != name],
    )


def test_every_run_is_a_row_and_none_is_done_twice(study, runs, tmp_path, capsys):
    out = ["--out", str(tmp_path / "new" / "folder")]
    study.main([*out, "--seeds", "1"])
    rows = study.main(out)
    assert runs.asked == [(task, arm, seed, 0.1) for seed in (1, 0) for task in "ab" for arm in study.arms]
    assert rows == read_table(tmp_path / "new" / "folder" / "fake.csv") and len(rows) == 8
    assert list(rows[0]) == ["task", "arm", "seed", "trial", "loss", "size", "steps", "seconds"]
    assert study.main([*out, "--report"]) == rows and len(runs.asked) == 8
    assert "b, salora-8-to-4, 0: 2.0000" in capsys.readouterr().out, "each run says how it went"


def test_tuning_has_a_seed_of_its_own_and_runs_take_the_best_mean_over_its_tasks(study, runs, tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    rows = study.main(["--tune", *out])
    assert {seed for _, _, seed, _ in runs.asked} == {TUNE_SEED} and len(rows) == 2 * 2 * 4
    assert study.main(["--tune", *out]) == rows and len(runs.asked) == 16, "no trial is run twice"
    assert not (tmp_path / "fake.csv").exists(), "a report knows nothing of tuning"
    assert "lora-4 on a and b: 1.5000 (0.2), 2.0000 (0.35)" in capsys.readouterr().out
    study.main(["--tune", "--tasks", "a", "--grid", ".201", *out])
    runs.asked.clear()
    study.main(out)
    assert {trial for *_, trial in runs.asked} == {0.2}, "not .201, which has not run on both tasks"
    replace(study, by_task=True).main([*out, "--seeds", "2"])
    assert {(task, trial) for task, _, seed, trial in runs.asked if seed == 2} == {("a", 0.2), ("b", 0.35)}
    out[1] += "/highest"
    replace(study, lowest=False).main(["--tune", *out])
    replace(study, lowest=False).main([*out, "--seeds", "3"])
    assert {trial for _, _, seed, trial in runs.asked if seed == 3} == {0.1}, "where the highest score is the best"


def test_trials_are_ranked_by_the_mean_over_all_seeds_for_tuning(study, tmp_path):
    losses = {(0.1, 100): 0.0, (0.1, 101): 1.0, (0.2, 100): 0.4, (0.2, 101): 0.4}

    def measure(args, task, arm, seed, trial):
        return {"loss": losses.get((*trial, seed), 0.0), "size": 0.5}

    study = replace(study, tune_seeds=(100, 101), trials=lambda *_: [(0.1,), (0.2,)], measure=measure)
    flags = ["--arms", "lora-4", "--tasks", "a", "--out", str(tmp_path)]
    study.main(["--tune", *flags])
    table = tmp_path / "tune.csv"
    rows = table.read_text()
    table.write_text(f"{rows}{rows.splitlines()[-1]}\n")  # as two processes at a time may leave it
    assert {row["trial"] for row in study.main(flags)} == {"0.2"}
    with pytest.raises(SystemExit):
        study.main(["--seeds", "101", *flags])


@pytest.mark.parametrize("lowest", [True, False])
def test_of_equal_trials_runs_take_the_one_with_the_lowest_rate_and_tuning_says_so(study, tmp_path, capsys, lowest):
    equal = replace(study, measure=lambda *_: {"loss": 0.5, "size": 0.5}, lowest=lowest)
    flags = ["--arms", "lora-4", "--tasks", "a", "--out", str(tmp_path)]
    equal.main(["--tune", "--grid", "0.3", "0.1", "0.2", *flags])
    assert "lora-4 on a: 0.5000 (0.1), 0.5000 (0.2), 0.5000 (0.3), a tie, so runs take" in capsys.readouterr().out
    assert {row["trial"] for row in equal.main(flags)} == {"0.1"}


def test_a_run_that_diverges_is_noted_not_repeated_and_part_of_no_mean(study, runs, tmp_path, capsys):
    broken = replace(study, default=lambda args, task, arm: (DIVERGES if arm.name == "lora-4" else 0.2,))
    for _ in range(2):
        rows = broken.main(["--tasks", "a", "--out", str(tmp_path)])
    assert len(rows) == len(runs.asked) == 4
    assert [(float(row["loss"]), row["size"]) for row in rows[:2]] == [(inf, ""), (0.0, "0.5")]
    said = capsys.readouterr().out
    assert "a, lora-4, 0: inf (the loss is nan at step 1, not finite)" in said
    assert "diverged, and in no mean: lora-4 on a, seed 0; lora-4 on a, seed 1" in said
    assert "lora-4  " not in said, "no line of the table"
    assert replace(broken, lowest=False).main(["--seeds", "5", "--out", str(tmp_path)])[0]["loss"] == "-inf"
    for i, wrong in enumerate((float("nan"), inf, -inf)):
        odd = replace(study, measure=lambda *_, loss=wrong: {"loss": loss, "size": 0.5})
        row = odd.main(["--seeds", str(6 + i), "--arms", "lora-4", "--tasks", "a", "--out", str(tmp_path)])[0]
        assert (row["loss"], row["size"]) == ("inf", ""), "a score that is no number is the worst, too"


def test_report_and_picture_are_about_the_tasks_and_seeds_asked_for(study, tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    replace(study, draw=lambda rows: None).main(out)
    assert not list(tmp_path.glob("*.png")), "there is nothing to draw yet"
    rows = study.main(["--tasks", "a", "--seeds", "1", "2", *out])
    assert {(row["task"], row["seed"]) for row in rows} == {("a", "1"), ("a", "2")}
    assert {row["seed"] for row in study.main(["--tasks", "a", "--report", *out])} == {"0", "1", "2"}
    assert {row["arm"] for row in study.main(["--arms", "lora-4", "--report", *out])} == {"lora-4"}
    assert "mean of a and b: loss" in capsys.readouterr().out
    drawn = []
    replace(study, draw=lambda rows: drawn.extend(rows) or Figure()).main(["--report", "--tasks", "b", *out])
    assert {row["task"] for row in drawn} == {"b"} and (tmp_path / "fake.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_has_the_differences_from_any_arm_in_every_column(study, tmp_path, capsys):
    def measure(args, task, arm, seed, trial):
        return {"loss": len(arm.name) + seed, "size": arm.start / 8}

    study = replace(study, measure=measure, rivals=lambda name, names: [])
    out = ["--tasks", "a", "--arms", "lora-4", "lora-8", "lora-16", "--out", str(tmp_path)]
    study.main(out)
    capsys.readouterr()
    study.main([*out, "--report", "--minus", "lora-8"])
    said = capsys.readouterr().out
    assert "a: differences in loss over shared seeds" in said and "a: differences in size over shared seeds" in said
    lines = [line.split() for line in said.splitlines() if " - lora-8 " in line]
    assert [(line[0], line[3]) for line in lines] == [
        ("lora-4", "+0.0000"), ("lora-16", "+1.0000"), ("lora-4", "-0.5000"), ("lora-16", "+1.0000"),
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        study.main([*out, "--report", "--minus", "lora-2"])
    assert "--minus lora-2: none of these runs is of that arm" in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    (["--seeds", "0", "100"], "--seeds: 100 is a seed for tuning"),
    (["--arms", "best-4"], "'best-4' is not an arm"),
    (["--grid", "fast"], "'fast' is not LR or LR:SCALE, such as 0.006:2"),
    (["--tune", "--report"], "not allowed with"),
    (["--grid", ".1"], "--grid is what --tune tries: it needs --tune"),
    (["--report"], "no such runs in"),
    (["--steps", "11"], "has runs with another --steps: choose another --out"),
    (["--out", "{}/old"], "fake.csv has other columns than this version of the program writes: choose another --out"),
    (["--out", "{}/file"], "file is a file: choose another --out"),
])  # fmt: skip
def test_bad_input_is_one_line(study, flags, said, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "fake.csv").write_text("kind,arm,seed,loss\na,lora-4,0,1.0\n")
    if "--steps" in flags:
        study.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        study.main(["--out", str(tmp_path), *(flag.format(tmp_path) for flag in flags)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_an_arm_that_was_not_tuned_ends_a_study_before_its_first_run(study, runs, tmp_path, capsys):
    strict, out = replace(study, default=None), ["--out", str(tmp_path / "out")]
    for first, arm in (([], "lora-4"), (["--tune", "--arms", "lora-4"], "salora-8-to-4")):
        if first:
            strict.main([*out, *first])
        runs.asked.clear()
        with pytest.raises(SystemExit):
            strict.main(out)
        error = capsys.readouterr().err
        assert f"{arm} has not been tuned: first run with --tune and the same --out" in error
        assert runs.asked == [] and (tmp_path / "out").exists() == bool(first), "and leaves no empty folder"


@pytest.fixture
def table(study, tmp_path):
    """The file of a study's table, and what it holds once all its runs are done."""
    study.main(["--out", str(tmp_path)])
    return tmp_path / "fake.csv", (tmp_path / "fake.csv").read_bytes()


def test_a_table_that_is_cut_off_anywhere_is_completed_by_the_same_command(study, runs, table):
    """By a kill, or by a disk that was full: what is not a whole line is not there."""
    path, whole = table
    rows = read_table(path)
    for size in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:size])
        runs.asked.clear()
        with row_of(size):
            again = study.main(["--out", str(path.parent)])
            assert [{**row, "seconds": ""} for row in again] == [{**row, "seconds": ""} for row in rows]
            assert len(runs.asked) == len(rows) - max(0, whole[:size].count(b"\n") - 1), "the others are not run again"


DAMAGE = {  # to the text of a table, and what is said of which line
    "the header once more": (lambda lines: lines + lines[:1], "line 10: the header once more"),
    "two tables": (lambda lines: lines + lines, "line 10: the header once more"),
    "two columns of one name": (lambda lines: [lines[0].replace("size", "loss")], "has two columns of one name: task"),
    "no header": (lambda lines: lines[1:], "has other columns than this version of the program writes"),
    "another header": (lambda lines: [lines[0].replace("size", "mass")], "has other columns than this version of"),
    "a cell too many": (lambda lines: lines[:3] + [lines[3] + ",1"], "line 4: 9 cells, expected 8"),
    "a line in the middle": (lambda lines: lines[:2] + [lines[2][:9]] + lines[3:], "line 3: 2 cells, expected 8"),
    "another task": (lambda lines: lines[:1] + ["c" + lines[1][1:]], "line 2: 'c' is not a task of this study"),
    "another arm": (lambda lines: lines[:1] + [lines[1].replace("lora-4", "best")], "line 2: 'best' is not an arm"),
    "a seed": (lambda lines: lines[:1] + [lines[1].replace(",0,", ",first,")], "line 2: invalid literal for int()"),
    "a loss": (lambda lines: lines[:1] + [lines[1].replace(",1.0,", ",low,")], "line 2: could not convert string to"),
    "no loss": (lambda lines: lines[:1] + [lines[1].replace(",1.0,", ",,")], "line 2: could not convert string to fl"),
    "a size": (lambda lines: lines[:1] + [lines[1].replace(",0.5,", ",,")], "line 2: could not convert string to flo"),
    "a trial": (lambda lines: lines[:1] + [lines[1].replace(",0.1,", ",fast,")], "line 2: 'fast' is not LR or LR:SCA"),
    "a quotation mark": (lambda lines: lines[:1] + ['"' + lines[1]], "is damaged, or no CSV file: "),
    "other bytes": (lambda lines: ["\udcff\udcfe"], "is damaged, or no CSV file: 'utf-8' codec can't decode byte 0xff"),
    "something else": (lambda lines: ["Dear reader,", "this is no table."], "has other columns than this version"),
}


@pytest.mark.parametrize("name", ["fake", "tune"])
def test_a_table_that_is_damaged_in_any_other_way_is_refused_with_its_line_and_left_alone(name, study, table, capsys):
    path, whole = table
    out, lines = ["--out", str(path.parent)], whole.decode().splitlines()
    if name == "tune":
        path = path.rename(path.parent / "tune.csv")
    for kind, (damaged, said) in DAMAGE.items():
        before = "".join(f"{line}\r\n" for line in damaged(list(lines))).encode(errors="surrogateescape")
        path.write_bytes(before)
        for flags in (["--report"], []) if name == "fake" else (["--tune"], []):
            with row_of(kind, flags), pytest.raises(SystemExit) as ended:
                study.main([*out, *flags])
            error = capsys.readouterr().err
            assert ended.value.code == 2 and error.count("\n") == 1, error
            assert said in error and str(path) in error and path.read_bytes() == before, error
    path.unlink()
    path.mkdir()
    with pytest.raises(SystemExit):
        study.main(out)
    assert "is not a regular file" in capsys.readouterr().err


T_TABLE = {(0.95, 1): 12.7062047, (0.95, 2): 4.3026527, (0.95, 4): 2.7764451, (0.9, 4): 2.1318468, (0.95, 9): 2.2621572}


def naive_interval(values, level=0.95):
    reach = T_TABLE[level, len(values) - 1] * stdev(values) / len(values) ** 0.5
    return [mean(values) - reach, mean(values) + reach]


def test_intervals_are_students():
    for (level, df), t in T_TABLE.items():  # as printed in textbooks
        assert tables.t_quantile(level, df) == pytest.approx(t, rel=1e-6)
    values = [1.2, 0.7, 1.9, 1.1, 0.4]
    for level in (0.95, 0.9):
        assert tables.interval(values, level) == pytest.approx(naive_interval(values, level), rel=1e-6)


def test_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 7, 19, 100):
        for level in (0.5, 0.9, 0.95, 0.99):
            assert tables.t_quantile(level, df) == pytest.approx(stats.t.ppf((1 + level) / 2, df), rel=1e-5)


def cells(table, name):
    [line] = [line for line in table.splitlines() if line.strip().startswith(name + "  ")]
    return line.removeprefix(f"  {name}").split()


def test_differences_are_over_the_seeds_that_both_arms_have():
    values = {"lora-4": {0: 2.0, 1: 3.0, 2: 5.0, 7: 100.0}, "salora-8-to-4": {0: 1.5, 2: 4.9, 1: 2.8, 9: -100.0}}
    gaps = [1.5 - 2.0, 2.8 - 3.0, 4.9 - 5.0]
    low, high = naive_interval(gaps)
    table = tables.differences(values, lambda name, names: ["lora-4"] if name != "lora-4" else [], "title")
    expected = f"{mean(gaps):+.4f} {stdev(gaps) / 3**0.5:.4f} [{low:+.4f}, {high:+.4f}] 3 of 3"
    assert " ".join(cells(table, "salora-8-to-4 - lora-4")) == expected
    assert tables.differences({"a": {0: 1.0}, "b": {0: 2.0}}, lambda *_: ["b"], "") == "", "one seed has no interval"
    for spread, same in ((0.004, True), (0.02, False)):
        values = {"a": dict(enumerate([spread, -spread, 0.0, 0.001, -0.001])), "b": dict.fromkeys(range(5), 0.0)}
        table = tables.differences(values, lambda name, names: ["b"] if name == "a" else [], "", same=0.005)
        assert table.endswith(", same") == same, "where the 90 % interval lies within the margin"


def row(task, arm, seed, loss):
    return {"task": task, "arm": arm, "seed": str(seed), "loss": str(loss)}


def test_means_over_tasks_are_of_seeds_that_have_run_on_all_of_them():
    rows = [row("a", "x", 0, 1), row("a", "x", 1, 2), row("b", "x", 1, 4), row("b", "y", 1, 9)]
    assert tables.values_of(rows, "loss", "a", "b") == {"x": {1: 3}}
    assert tables.values_of(rows, "loss", "b") == {"x": {1: 4}, "y": {1: 9}}
    table = tables.means({"x": {0: 1.0, 1: 2.0}, "y": {0: 5.0}}, "title", {"final": {"x": {0: 13790}, "y": {0: 0.5}}})
    low, high = naive_interval([1.0, 2.0])
    assert " ".join(cells(table, "x")) == f"13,790 2 1.5000 {stdev([1, 2]):.4f} [{low:.4f}, {high:.4f}]"
    assert cells(table, "y") == ["0.5000", "1", "5.0000", "-", "-"]


def test_the_share_of_a_gap_is_that_of_paired_seeds():
    """The mean gap that is closed over the mean gap, not the mean of both, in which a narrow gap would count most."""
    closed, gaps = [0.75, 0.0, 0.5, 0.1, 0.3], [1.0, 0.25, 0.5, 2.0, 0.1]
    losses = {"lora-4": {i: 2.0 for i in range(5)}, "lora-8": {i: 2.0 - gap for i, gap in enumerate(gaps)}}
    losses["svd-16-to-4"] = {5: 9.0, **{i: 2.0 - some for i, some in enumerate(closed)}}
    share = sum(closed) / sum(gaps)
    low, high = naive_interval([share + (some - share * gap) / mean(gaps) for some, gap in zip(closed, gaps)])
    expected = [f"{share:.2f}", f"[{low:.2f},", f"{high:.2f}]"]
    assert cells(tables.gaps_closed(losses, "title"), "svd-16-to-4") == expected


def test_a_seed_decides_the_order_of_the_rows_and_the_noise_of_the_gates():
    def trained(seed):
        torch.manual_seed(0)
        model, seen = adapt(nn.Sequential(nn.Linear(1, 4)), ["0"], 8), []

        def batch_of(rows, model, device):
            seen.append(rows)
            x = torch.tensor(rows)[:, None]
            return (x,), torch.cat([x, x**2, x - 1, 1 - x], 1)

        rows = [i / 12 for i in range(12)]
        allocator = fit(model, rows, arm_of("salora-8-to-4-paper"), lr=0.01, seed=seed, steps=20, batch_size=4,
                        batch_of=batch_of)  # fmt: skip
        assert all(sorted(sum(seen[i : i + 3], [])) == rows for i in range(0, 18, 3)), "each row once an epoch"
        return seen, allocator.noise.get_state().tolist()

    (one, noise), again, (other, others) = trained(1), trained(1), trained(2)
    assert again == (one, noise) and one != other and noise != others


ARMS = {  # name -> family, method, start, size
    "lora-4": ("lora", "lora", 4, 4),
    "lora-4-restart": ("lora-restart", "salora", 4, 4),
    "lora-4-found": ("lora-found", "lora", 16, 4),
    "salora-16-to-.5": ("salora-16", "salora", 16, 0.5),
    "salora-8-to-4-paper": ("salora-8-paper", "salora", 8, 4),
    "svd-16-to-4": ("svd-16", "salora", 16, 4),
    "alora-8-to-4": ("alora-8", "alora", 8, 4),
    "rm-lora-4-beta-0": ("rm-lora-beta-0", "rm-lora", 4, 4),
    "adalora-8-to-4-eq-4": ("adalora-8-eq-4", "adalora", 8, 4),
    "adapter-h-16": ("adapter-h", "adapter-h", 16, 16),
    "bitfit": ("bitfit", "bitfit", None, 0),
}
WRONG = ["", "salora", "svd", "lora-.5", "lora-0", "lora-8-to-4", "salora-16-to-17", "salora-8-to-0", "best-4",
         "full-3", "adapter-h", "lora-4-paper", "svd-8-to-4-paper", "salora-8-to-4-better", "sora-8-to-4",
         "rm-lora-4-beta-1", "lora-4-beta-0"]  # fmt: skip


def test_a_name_says_what_an_arm_is_and_one_that_means_nothing_is_refused():
    found = {name: arm_of(name) for name in ARMS}
    assert {name: (arm.family, arm.method, arm.start, arm.size) for name, arm in found.items()} == ARMS
    assert [name for name, arm in found.items() if arm.placement] == ["lora-4-found"]
    for name in WRONG:
        with pytest.raises(ArgumentTypeError, match="is not an arm"):
            arm_of(name)


def test_an_arm_has_the_allocator_recipe_and_budget_of_its_name():
    def allocator(name, **options):
        model = adapt(nn.Sequential(nn.Linear(6, 8)), ["0"], arm_of(name).start, alpha=8)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
        return arm_of(name).allocator(model, optimizer, 100, 0, **options)

    found = [allocator(name) for name in ("salora-8-to-4", "svd-16-to-4", "salora-8-to-2-paper", "lora-4-restart")]
    assert [some.budget for some in found] == [0.5, 0.25, 0.25, 1]
    assert found[0].recipe == Recipe.ours() and found[2].recipe == Recipe.paper()
    assert found[1].schedule.window_steps == found[3].schedule.window_steps == 0, "no gate trains"
    lora, alora = allocator("lora-4"), allocator("alora-8-to-4", score=lambda: 0.0)
    assert type(lora) is FixedRanks and type(alora) is ALoRA and alora.budget == 0.5
    assert lora.lr_factor(0) == alora.lr_factor(0) < 0.5, "all of them warm up"

    names = ("rm-lora-4", "rm-lora-4-beta-0", "rm-lora-4-share-1")
    assert [(some.beta, some.share) for some in map(allocator, names)] == [(0.1, 0.5), (0, 0.5), (0.1, 1)]
    regularizers = [allocator(name).regularizer for name in ("adalora-8-to-4", "adalora-8-to-4-eq-4")]
    assert regularizers == [mean_norm, orthogonality]
    assert [allocator(name).times_lr for name in ("sora-8", "sora-8-eq-10")] == [False, True]


def test_an_arm_that_is_not_in_a_table_takes_the_nearest_of_its_family_or_of_its_kind():
    table = {"lora-8": 8, "lora-1": 1, "salora-16-to-4": 164, "salora-16-to-1": 161, "salora-8-to-4": 84}
    wanted = {"lora-2": 1, "salora-8-to-1": 84, "salora-16-to-3": 164, "adalora-8-to-2": 161, "lora-8-restart": 8}
    assert {name: nearest(arm_of(name), table) for name in wanted} == wanted
    assert nearest(arm_of("lora-4"), {}) is None
