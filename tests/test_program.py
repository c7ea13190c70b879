"""The main job as a user meets it, but in this process and at tiny size: outputs, budget, resume, flags, bad input."""

import csv
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import budget
import train_glue_mini
from cli import report, setup
from cli.flags import METHODS, TRIPLET_METHODS, build_parser, device_of, settle
from cli.journal import Journal
from cli.workers import share_of
from glue.mini import TASKS as MINI_TASKS
from glue.tasks import NAMES, task_of
from hard_concrete import HardConcreteGate
from peers import PEERS
from salora import adapt, salora_layers
from train_glue_mini import main

KEYS = {
    "task", "method", "metric", "score", "density_target", "density_expected", "density_kept", "adapter_params_total",
    "adapter_params_kept", "ranks", "steps", "seconds", "seed", "device", "command", "versions", "adapter_digest",
    "frozen_digest",
}  # fmt: skip
ALLOCATING = [name for name, peer in PEERS.items() if peer.allocator]
FILES = ["adapter.pt", "log.csv", "ranks.png", "settings.json", "summary.json", "training.png"]


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Drawing takes longer than these runs: only the test that is about pictures draws them."""
    if "pictures" not in request.node.name:
        for name in ("draw_training", "draw_ranks", "draw_trace"):
            monkeypatch.setattr(report, name, lambda *values: next(v for v in values if hasattr(v, "touch")).touch())


@pytest.fixture
def go(tiny_weights, tmp_path, monkeypatch):
    """Run the main job on the tiny random encoder: go("--flag", value ...) -> summary."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        small = {"--weights": tiny_weights, "--rows": 48, "--batch-size": 8, "--steps": 20, "--device": "cpu"}
        given = [str(flag) for flag in flags]
        if not {"--resume", "--evaluate", "--export"} & set(given):
            given += [str(x) for flag, value in small.items() if flag not in given for x in (flag, value)]
        return main(given)

    return call


def log_of(folder, file="log.csv"):
    with open(folder / file, newline="") as file:
        return list(csv.DictReader(file))


# What a run leaves behind


@pytest.mark.parametrize("task", MINI_TASKS)
def test_every_task_runs_within_its_budget_and_writes_its_files(go, tmp_path, task):
    summary = go("--task", task, "--out", tmp_path / "run")
    assert set(summary) == KEYS | {"recipe"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == FILES, "and no checkpoint or temporary file"
    total, kept = summary["adapter_params_total"], summary["adapter_params_kept"]
    assert total - 48 <= 2 * kept <= total, "kept parameters: at most half, and within one triplet (16 + 32) of it"
    assert summary["density_kept"] == kept / total and summary["density_target"] == 0.5
    assert len(summary["ranks"]) == 12 and summary["steps"] == 20 and summary["task"] == task
    sizes = {"up": 48, "down": 48}
    assert kept == sum(rank * sizes.get(name.split(".")[-1], 32) for name, rank in summary["ranks"].items())
    phases = [row["phase"] for row in log_of(tmp_path / "run")]
    assert phases == ["open"] * 8 + ["window"] * 2 + ["frozen"] * 10


def test_the_status_line_shows_lambda_where_there_is_one(go, capsys):
    go("--recipe", "paper")
    assert " -> 0.5 | lambda " in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags,pictures",
    [("", 2), ("--trace", 3), ("--recipe paper", 2), ("--method full", 1), ("--method prefix", 1),
     *((f"--method {name}", 2) for name in ("lora", "adalora", "sora", "alora"))],
)  # fmt: skip
def test_pictures_are_drawn(go, tmp_path, flags, pictures):
    go(*flags.split(), "--steps", 6, "--out", tmp_path / "run")
    drawn = [path for path in (tmp_path / "run").glob("*.png") if path.read_bytes().startswith(b"\x89PNG")]
    assert len(drawn) == pictures and all(path.stat().st_size > 5000 for path in drawn)


SOME_SLOW = [pytest.param(name, marks=pytest.mark.slow if name in PEERS else ()) for name in METHODS if name != "head"]


@pytest.mark.parametrize("method", SOME_SLOW)
def test_loss_falls(go, tmp_path, method):
    lr = max(3e-3, METHODS[method][0])
    flags = ["--steps", 120, "--rows", 16, "--batch-size", 16, "--lr", lr, "--out", tmp_path / "run"]
    go("--task", "mini-sst2", "--method", method, *flags)
    losses = [float(row["loss"]) for row in log_of(tmp_path / "run")]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_methods_train_what_they_say(go, tmp_path):
    lora = go("--method", "lora")
    assert lora["density_kept"] == lora["density_expected"] == lora["density_target"] == 1
    assert set(lora["ranks"].values()) == {8}
    for method in [name for name in METHODS if name not in TRIPLET_METHODS]:
        summary = go("--method", method)
        assert set(summary) == KEYS and summary["ranks"] == {} and summary["adapter_params_total"] == 0
        assert summary["density_kept"] is summary["density_expected"] is summary["density_target"] is None
        folder = tmp_path / "runs" / f"mini-cola-{method}-s0"
        state = torch.load(folder / "adapter.pt", weights_only=True)["others"]
        assert any(name.startswith("encoder") for name in state) == (method != "head")
        assert any(name.startswith("classifier") for name in state)


def test_lora_is_salora_with_its_gates_open(go, tmp_path):
    """The same code path: an empty window at the end and a density of 1 change nothing else."""
    lora = go("--method", "lora", "--out", tmp_path / "a")
    same = go("--density", 1, "--window", 1, 1, "--no-canonical", "--spread", 0, "--out", tmp_path / "b")
    assert (same["score"], same["ranks"]) == (lora["score"], lora["ranks"])
    assert adapter_of(tmp_path / "a") == adapter_of(tmp_path / "b")


def adapter_of(folder):
    """All numbers of a saved adapter, as nested lists, so that == compares exactly."""
    state = torch.load(folder / "adapter.pt", weights_only=True)
    plain = {name: value.tolist() for name, value in state["others"].items()}
    for name, layer in state["layers"].items():
        plain[name] = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in layer.items()}
    return plain


@pytest.mark.parametrize("method", ["salora", *ALLOCATING, "prompt"])
def test_equal_seeds_give_equal_runs_and_others_do_not(go, tmp_path, method):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        go("--method", method, "--seed", seed, "--out", tmp_path / name)
    assert adapter_of(tmp_path / "a") == adapter_of(tmp_path / "b") != adapter_of(tmp_path / "c")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_several_tasks_and_seeds_are_summarized_in_a_table(go, tmp_path, capsys):
    result = go("--task", "all", "--seed", 0, 1, "--steps", 3, "--rows", 8)
    assert [run["task"] for run in result["runs"]] == [task for task in MINI_TASKS for _ in range(2)]
    table = capsys.readouterr().out.splitlines()[-10:]
    assert table[0].split()[:3] == ["task", "metric", "score"] and table[-1].startswith("average")
    assert (tmp_path / "runs" / "all-salora" / "mini-rte-s1" / "summary.json").is_file()


def test_default_folders_are_numbered_on_and_a_given_one_is_never_overwritten(go, tmp_path, capsys):
    for _ in range(2):
        go()
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["mini-cola-salora-s0", "mini-cola-salora-s0-1"]
    before = (tmp_path / "runs" / "mini-cola-salora-s0" / "summary.json").read_bytes()
    message = refused(capsys, go, "--out", "runs/mini-cola-salora-s0")
    assert "is not empty: choose another --out" in message
    assert (tmp_path / "runs" / "mini-cola-salora-s0" / "summary.json").read_bytes() == before


def test_the_status_line_and_the_start_say_what_is_going_on(go, capsys):
    go()
    out = capsys.readouterr().out
    assert "mini-cola, salora, seed 0 on cpu: 48 training rows, 1000 dev" in out
    assert "11,346 parameters, 3,890 trained, 3,584 budgeted" in out  # 2 blocks of (4 x 32 + 2 x 48) x 8
    assert "gates train from step 8 to 10 of 20, gate lr 7" in out
    assert "step 10/20 | loss 0." in out and " | C 0.500 -> 0.5 | kept " in out and "/96 | " in out
    assert "of 3,584 adapter parameters: 0.49" in out or "kept 1,792 of 3,584 adapter parameters: 0.5000" in out


def test_a_log_row_is_the_mean_loss_of_the_steps_since_the_last_one():
    """At most 200 rows or so: here one every second step."""
    model = adapt(torch.nn.Sequential(torch.nn.Linear(3, 2)), ["0"], 1, 1)
    optimizer, allocator = torch.optim.SGD([model[0].A], lr=0.5), budget.FixedRanks(model, 401)
    journal = Journal(401)
    journal.begin_epoch(0, model, optimizer, allocator)
    for step in range(401):
        journal.add(step, torch.tensor(float(step)), optimizer, allocator, 8)
    assert [row["step"] for row in journal.rows] == [*range(2, 401, 2), 401], "and the last step has one of its own"
    assert [row["loss"] for row in journal.rows] == [*(step + 0.5 for step in range(0, 400, 2)), 400]
    assert {row["lr"] for row in journal.rows} == {0.5}


def test_a_trace_has_every_matrix_at_every_logged_step_and_changes_no_number(go, tmp_path):
    summary = go("--trace", "--out", tmp_path / "traced")
    go("--out", tmp_path / "plain")
    assert adapter_of(tmp_path / "traced") == adapter_of(tmp_path / "plain")
    assert not (tmp_path / "plain" / "trace.csv").exists()

    log, trace = (log_of(tmp_path / "traced", file) for file in ("log.csv", "trace.csv"))
    assert len(trace) == 12 * len(log) and set(trace[0]) == set(report.TRACE)
    for row in log:
        layers = [traced for traced in trace if traced["step"] == row["step"]]
        sizes = [48 if traced["layer"].endswith(("up", "down")) else 32 for traced in layers]
        expected = sum(float(traced["open"]) * size for traced, size in zip(layers, sizes))
        assert expected / 3584 == pytest.approx(float(row["C"]), abs=1e-5), "Eq. (11)"
        assert all(len(json.loads(traced["log_theta"])) == int(traced["rank"]) for traced in layers)
    assert {traced["layer"]: int(traced["rank"]) for traced in layers} == summary["ranks"]
    saved = torch.load(tmp_path / "traced" / "adapter.pt", weights_only=True)["layers"]
    for traced in layers:
        A, B = (saved[traced["layer"]][side] for side in "AB")
        orth_A, orth_B = (torch.dist(gram, torch.eye(len(A))) ** 2 for gram in (A @ A.T, B.T @ B))
        assert (orth_A.item(), orth_B.item()) == pytest.approx((float(traced["orth_A"]), float(traced["orth_B"])), 1e-4)


def test_the_table_of_ranks_has_a_line_a_block_and_a_column_a_matrix():
    ranks = {"encoder.layers.0.up": 3, "encoder.layers.0.down": 12, "encoder.layers.10.up": 0}
    assert report.rank_table(ranks).splitlines() == [
        "rank         up   down",
        "block 0       3     12",
        "block 10      0      -",
    ]
    assert report.rank_table({"query": 5}).splitlines() == ["rank      query", "block 0       5"]


# Phases


@pytest.mark.equation("alg 1", "noise")
def test_noise_is_drawn_once_a_step_of_the_window_and_gates_move_only_there(go, monkeypatch):
    draws, seen = [], []
    resample, orthogonality = budget.resample, budget.orthogonality

    def counted(layers, generator):
        resample(layers, generator)
        draws.append(torch.cat([layer.gate.u for layer in layers.values()]))

    def spy(layers):
        seen.append(torch.cat([layer.gate.log_theta.detach().clone() for layer in layers.values()]))
        return orthogonality(layers)

    monkeypatch.setattr(budget, "resample", counted)
    monkeypatch.setattr(budget, "orthogonality", spy)
    go("--recipe", "paper")
    assert len(draws) == 6 and all(not torch.equal(a, b) for a, b in zip(draws, draws[1:], strict=False))
    assert all(not theta.any() for theta in seen[:5]), "log theta stays 0 until the window's first step is done"
    assert all(not torch.equal(a, b) for a, b in zip(seen[4:10], seen[5:10], strict=False))


@pytest.mark.parametrize("method", ["salora", *PEERS])
def test_frozen_weights_stay_bitwise_and_survivors_are_plain_lora(go, monkeypatch, method):
    kept = {}
    fine_tune = train_glue_mini.fine_tune

    def watched(model, *rest, **more):
        frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad and ".gate." not in n}
        before = {n: p.clone() for n, p in frozen.items()}
        result = fine_tune(model, *rest, **more)
        after = dict(model.named_parameters())
        assert "encoder.layers.0.norm1.weight" in before or method == "adapter-h"
        assert before and all(torch.equal(value, after[name]) for name, value in before.items())
        kept["model"] = model
        return result

    monkeypatch.setattr(train_glue_mini, "fine_tune", watched)
    go("--method", method)
    layers = salora_layers(kept["model"]).values()
    assert bool(layers) == (method in TRIPLET_METHODS)
    assert all(type(layer.gate) is HardConcreteGate for layer in layers)
    assert all(torch.equal(layer.gate.fixed, torch.ones(layer.r)) and layer.scale == 2 for layer in layers)


@pytest.mark.equation("canonical")
@pytest.mark.parametrize("flag,moments", [("--canonical", False), ("--no-canonical", True)])
def test_moments_start_anew_with_canonical_triplets_only(go, monkeypatch, flag, moments):
    made, seen, AdamW, resample = [], [], torch.optim.AdamW, budget.resample

    def make(*values, **named):
        made.append(AdamW(*values, **named))
        return made[-1]

    def spy(layers, noise):
        seen.append({p in made[0].state for layer in layers.values() for p in (layer.A, layer.B)})
        resample(layers, noise)

    monkeypatch.setattr(torch.optim, "AdamW", make)
    monkeypatch.setattr(budget, "resample", spy)
    go(flag)
    assert seen[0] == {moments} and seen[1] == {True}


# Resume


@pytest.mark.parametrize("stop", [8, 16, 31], ids=["open", "window", "frozen"])
@pytest.mark.parametrize(
    "flags",
    [[], ["--trace"], ["--recipe", "paper"], *(["--method", name] for name in ("full", *PEERS))],
    ids=lambda flags: flags[-1] if flags else "salora",
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(go, tmp_path, monkeypatch, stop, flags):
    flags = ["--steps", 40, "--dropout", 0.1, *flags]  # 6 steps an epoch; the window is 8 to 20
    whole = go(*flags, "--out", tmp_path / "whole")
    task_loss, calls = train_glue_mini.task_loss, []

    def interrupted(outputs, labels):
        if torch.is_grad_enabled():  # not where ALoRA scores its ranks
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
        return task_loss(outputs, labels)

    monkeypatch.setattr(train_glue_mini, "task_loss", interrupted)
    with pytest.raises(SystemExit) as exit_:
        go(*flags, "--out", tmp_path / "part")
    assert exit_.value.code == 130
    assert sorted(p.name for p in (tmp_path / "part").iterdir()) == ["checkpoint.pt", "settings.json"]
    resumed = go("--resume", tmp_path / "part")
    assert len(calls) == stop + 40 - (stop - 1) // 6 * 6, "only what was lost is done again"
    assert {**resumed, "seconds": 0, "command": ""} == {**whole, "seconds": 0, "command": ""}
    assert adapter_of(tmp_path / "part") == adapter_of(tmp_path / "whole")
    for file in {"log.csv", "trace.csv"} & {path.name for path in (tmp_path / "whole").iterdir()}:
        assert (tmp_path / "part" / file).read_text() == (tmp_path / "whole" / file).read_text()


# Afterwards


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_scores_the_same_again(go, tmp_path, capsys, method):
    summary = go("--method", method, "--task", "mini-stsb", "--out", tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    again = go("--evaluate", tmp_path / "run")
    assert again == {"task": "mini-stsb", "metric": "pearson", "score": summary["score"]}
    assert "mini-stsb: pearson " in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_predictions_are_what_glue_wants_submitted(go, tmp_path, capsys):
    rows = ["the dog chased the cat .", "the film was dull .", "cat the the ."] * 3
    test = tmp_path / "test.tsv"
    test.write_text("index\tsentence\n" + "".join(f"{i}\t{row}\n" for i, row in enumerate(rows)))
    go("--out", tmp_path / "run")
    go("--evaluate", tmp_path / "run", "--predict", test)
    lines = (tmp_path / "run" / "CoLA.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [*map(str, range(9))]
    answers = [line.split("\t")[1] for line in lines[1:]]
    assert set(answers) <= {"0", "1"} and answers[:3] == answers[3:6] == answers[6:]
    assert "9 rows of" in capsys.readouterr().out
    test.write_text("index\ttext\n0\ta\n")
    assert "has no column sentence" in refused(capsys, go, "--evaluate", tmp_path / "run", "--predict", test)


@pytest.mark.parametrize("test,file", [("test_matched.tsv", "MNLI-m.tsv"), ("test_mismatched.tsv", "MNLI-mm.tsv")])
def test_predictions_use_the_names_of_labels_and_of_both_test_sets(tmp_path, test, file):
    path = report.write_predictions(tmp_path, task_of("mnli"), test, [2, 0])
    assert path.name == file and path.read_text() == "index\tprediction\n0\tcontradiction\n1\tentailment\n"
    path = report.write_predictions(tmp_path, task_of("stsb"), "test.tsv", [5.3, 1.23456])
    assert path.read_text().split()[2:] == ["0", "5.000", "1", "1.235"]


# Hardware flags: the same numbers by other means


def losses_of(folder):
    return torch.tensor([[float(row[key] or 0) for key in ("loss", "C", "kept")] for row in log_of(folder)])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """An encoder without dropout, whose micro-batches may therefore differ in nothing but rounding."""
    from tiny_transformer import TinyTransformer, TransformerConfig, save_pretrained

    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = dict(vocab_size=130, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    calm = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = TransformerConfig(**sizes, **calm, initializer_range=0.2)
    save_pretrained(TinyTransformer(config), folder)
    return folder


VARIANTS = [["--recipe", "ours"], ["--recipe", "paper"], *(["--method", name] for name in PEERS)]


@pytest.mark.equation("alg 1", "noise")
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant[1])
def test_accumulating_equals_the_whole_batch_noise_included(go, tmp_path, wide, variant):
    flags = ["--weights", wide, "--task", "mini-mrpc", "--steps", 50, "--batch-size", 10, *variant]
    one = go(*flags, "--out", tmp_path / "one")
    four = go(*flags, "--accumulate", 4, "--out", tmp_path / "four")  # 10 rows in parts of 3, 3, 2, 2; 48 = 4 x 10 + 8
    worst = (losses_of(tmp_path / "one") - losses_of(tmp_path / "four")).abs().max()
    assert worst < 1e-5, "a batch in parts is not the whole batch: are the gates the same in all parts?"
    assert one["ranks"] == four["ranks"]


def test_a_batch_has_no_more_parts_than_rows():
    """A billion of them, empty but for ten, would take minutes."""
    parts = [list(part) for part in share_of(range(10), 10**9)]
    assert parts == [[row] for row in range(10)]


def test_recomputing_activations_changes_nothing(go, tmp_path):
    go("--dropout", 0.1, "--out", tmp_path / "one")
    go("--dropout", 0.1, "--recompute", "--out", tmp_path / "again")  # what is computed again must drop the same
    assert adapter_of(tmp_path / "one") == adapter_of(tmp_path / "again")


@pytest.mark.equation("alg 1", "noise")
@pytest.mark.parametrize("recipe", ["ours", "paper"])
def test_two_processes_train_like_one(go, tmp_path, wide, recipe):
    flags = ["--weights", wide, "--task", "mini-mnli", "--steps", 50, "--batch-size", 10, "--recipe", recipe]
    one = go(*flags, "--out", tmp_path / "one")
    rest = ["--rows", 48, "--device", "cpu", "--out", tmp_path / "two"]
    said = in_two_processes(tmp_path, [train_glue_mini.__file__, *flags, *rest])
    assert said.count("mini-mnli, salora, seed 0 on cpu and 1 more") == 1, "only the first worker speaks"
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (losses_of(tmp_path / "one") - losses_of(tmp_path / "two")).abs().max() < 1e-5
    assert one["ranks"] == two["ranks"] and sorted(p.name for p in (tmp_path / "two").iterdir()) == FILES


def in_two_processes(folder, command):
    """What a program that runs under torchrun in two processes prints; it must succeed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(list(map(str, torchrun + command)), capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


THREADS_AT_EXIT = """
import atexit, os, sys
sys.path.insert(0, sys.argv[1])
from train_glue_mini import main
tasks = "/proc/self/task"
atexit.register(lambda: print("at exit:", [open(f"{tasks}/{task}/comm").read().strip() for task in os.listdir(tasks)]))
main(sys.argv[2:])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the names of threads are read from /proc")
def test_no_thread_of_the_workers_outlives_python(tmp_path, wide):
    """Now and then such a thread aborts its process, and torchrun then stops the one that still writes."""
    (tmp_path / "driver.py").write_text(THREADS_AT_EXIT)
    flags = ["--weights", wide, "--steps", 12, "--rows", 48, "--device", "cpu", "--out", tmp_path / "two"]
    said = in_two_processes(tmp_path, [tmp_path / "driver.py", Path(train_glue_mini.__file__).parent, *flags])
    assert said.count("at exit:") == 2 and "gloo" not in said


ONE_AFTER_THE_OTHER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from train_glue_mini import main
for flags in json.loads(sys.argv[2]):
    main(flags)
"""


@pytest.fixture(scope="module")
def in_pairs(wide, tmp_path_factory):
    """(flags, folder): a run of every peer in two processes, which are started only once."""
    folder = tmp_path_factory.mktemp("pairs")
    flags = ["--weights", wide, "--task", "mini-mnli", "--steps", 50, "--batch-size", 10]
    flags += ["--rows", 48, "--device", "cpu"]
    runs = [[str(x) for x in (*flags, "--method", name, "--out", folder / name)] for name in PEERS]
    (folder / "driver.py").write_text(ONE_AFTER_THE_OTHER)
    in_two_processes(folder, [folder / "driver.py", Path(train_glue_mini.__file__).parent, json.dumps(runs)])
    return flags, folder


@pytest.mark.slow
@pytest.mark.parametrize("method", PEERS)
def test_two_processes_train_every_peer_like_one(go, tmp_path, in_pairs, method):
    flags, folder = in_pairs
    one = go(*flags, "--method", method, "--out", tmp_path / "one")
    two = json.loads((folder / method / "summary.json").read_text())
    assert (losses_of(tmp_path / "one") - losses_of(folder / method)).abs().max() < 1e-5
    assert one["ranks"] == two["ranks"]


@pytest.mark.parametrize("method", METHODS)
def test_bf16_computes_in_it_and_trains_weights_in_fp32(go, tmp_path, wide, method):
    flags = ["--weights", wide, "--method", method, "--steps", 12]
    for precision in ("fp32", "bf16"):
        summary = go(*flags, "--precision", precision, "--out", tmp_path / precision)
    gap = (losses_of(tmp_path / "fp32") - losses_of(tmp_path / "bf16"))[:3, 0].abs()  # before decisions may differ
    assert 0 < gap.max() < 0.05 and 0 <= abs(summary["score"]) <= 1
    state = torch.load(tmp_path / "bf16" / "adapter.pt", weights_only=True)
    triplets = [layer[side] for layer in state["layers"].values() for side in "AB"]
    assert {tensor.dtype for tensor in (*state["others"].values(), *triplets)} == {torch.float32}


def test_compiling_changes_rounding_only(go, tmp_path, wide, monkeypatch):
    """With the eager backend: the traced graphs are run as they are, which needs no compiler."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compile_(model, backend="eager"))
    go("--weights", wide, "--out", tmp_path / "one")
    go("--weights", wide, "--compile", "--out", tmp_path / "compiled")
    assert (losses_of(tmp_path / "one") - losses_of(tmp_path / "compiled")).abs().max() < 1e-5


# Flags

CHANGES = {
    "--task": ["mini-sst2"], "--method": ["lora"], "--rows": [32], "--rank": [4], "--alpha": [8], "--recipe": ["paper"],
    "--density": [0.25], "--rule": ["median"], "--survivors": ["median"], "--no-canonical": [], "--beta": [0.1],
    "--controller": ["sgd"], "--gate-lr": [0.02], "--window": [0.1, 0.4], "--epochs": [2], "--steps": [24],
    "--batch-size": [4], "--lr": [1e-4], "--max-length": [6], "--seed": [1], "--precision": ["bf16"],
    "--spread": [1], "--warmup": [0.2], "--dropout": [0.1], "--no-restart": [],
}  # fmt: skip


def run_of(tmp_path_factory, weights, **flags):
    """The adapter that 6 epochs of 6 steps with these flags leave behind."""
    folder = tmp_path_factory.mktemp("flags") / "run"
    length = {} if "--steps" in flags else {"--epochs": [6]}
    flags = {"--weights": weights, "--rows": [48], "--batch-size": [8], **length, "--out": [folder], **flags}
    main([str(x) for flag, values in flags.items() for x in (flag, *values)])
    return adapter_of(folder)


@pytest.fixture(scope="module")
def baseline(tiny_weights, tmp_path_factory):
    return run_of(tmp_path_factory, [tiny_weights])


@pytest.mark.parametrize("flag", CHANGES)
def test_every_flag_changes_the_run(flag, baseline, tiny_weights, tmp_path_factory):
    assert run_of(tmp_path_factory, [tiny_weights], **{flag: CHANGES[flag]}) != baseline, f"{flag} changes nothing"


def test_every_flag_has_help_and_is_either_tried_above_or_must_not_change_the_numbers():
    files = {"--data", "--weights", "--out", "--resume", "--evaluate", "--export", "--predict"}
    hardware = {"--device", "--accumulate", "--recompute", "--compile", "--deterministic", "--trace"}
    elsewhere = {*files, *hardware, "--canonical", "--restart", "--help", "--reach"}  # that of sora: test_peers.py
    actions = build_parser()._actions
    assert all(action.help for action in actions)
    flags = {option for action in actions for option in action.option_strings if option.startswith("--")}
    assert flags - elsewhere == set(CHANGES)


def test_recipes_are_the_published_one_and_the_default():
    parser = build_parser()
    paper, ours = (settle(parser.parse_args(["--recipe", name])) for name in ("paper", "ours"))
    assert (paper.rule, paper.survivors, paper.canonical, paper.beta) == ("median", "median", False, 0.1)
    assert (ours.rule, ours.survivors, ours.canonical) == ("budget", "one", True)
    assert (ours.restart, paper.restart) == (True, False)
    assert ours.epochs == 12 and settle(parser.parse_args(["--task", "sst2"])).epochs == 3
    assert settle(parser.parse_args([])).__dict__ == ours.__dict__
    assert settle(parser.parse_args(["--recipe", "paper", "--rule", "budget"])).rule == "budget"
    full, lora = (settle(parser.parse_args(["--method", name])) for name in ("full", "lora"))
    assert (paper.dropout, ours.dropout, full.dropout, lora.dropout) == (None, [0.0, 0.0], None, [0.0, 0.0])


def test_help_and_public_names():
    text = build_parser().format_help()
    assert all(name in text for name in NAMES)
    assert callable(main) and callable(train_glue_mini.build_parser)


# Bad input


def refused(capsys, call, *flags):
    """The call must end with one line on standard error, exit status 2 and no traceback; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        call(*flags)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("train_glue_mini.py: error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--task", "mini-snli"], "invalid choice: 'mini-snli'"),
        (["--density", 0], "density must be in (0, 1], got 0.0"),
        (["--density", 1.5], "density must be in (0, 1], got 1.5"),
        (["--window", 0.6, 0.5], "0 <= start <= end <= 1, got start=0.6, end=0.5"),
        (["--rank", 0], "argument --rank: expected a whole number above 0, got '0'"),
        (["--steps", "many"], "argument --steps: expected a whole number above 0, got 'many'"),
        (["--gate-lr", "fast"], "argument --gate-lr: expected auto or a number above 0, got 'fast'"),
        (["--lr", -1], "argument --lr: expected a number above 0, got '-1'"),
        (["--gate-lr", 1e38], "argument --gate-lr: expected a number below 1e+36, got '1e+38'"),
        (["--beta", "nan"], "argument --beta: expected a number, 0 or above, got 'nan'"),
        (["--dropout", 1.5], "argument --dropout: expected a number from 0 to below 1, got '1.5'"),
        (["--warmup", 1], "argument --warmup: expected a number from 0 to below 1, got '1'"),
        (["--max-length", 5], "--max-length must be at least 6, room for four special tokens"),
        (["--seed", 0, 1, 0], "--seed takes different numbers below 10^9, got 0 1 0"),
        (["--seed", 10**16], "--seed takes different numbers below 10^9, got 10000000000000000"),
        (["--epochs", 1, "--steps", 1], "argument --steps: not allowed with argument --epochs"),
        (["--data", "."], "task mini-cola is generated and reads no --data: drop it, or take --task cola"),
        (["--method", "full", "--rank", 4], "--rank is about adapters, and --method full has none"),
        (["--method", "head", "--alpha", 4], "--alpha is about low-rank adapters, and --method head has none"),
        (["--method", "prefix", "--alpha", 4], "--alpha is about low-rank adapters, and --method prefix has none"),
        (["--method", "bitfit", "--rank", 4], "--rank is about adapters, and --method bitfit has none"),
        (["--method", "sora", "--density", 0.5], "--density is about a budget, and --method sora has none"),
        (["--method", "adalora", "--reach", 1], "--reach is about a threshold, and --method adalora has none"),
        (["--method", "adalora", "--density", 2], "density must be in (0, 1], got 2.0"),
        (["--method", "alora", "--no-canonical"], "--canonical is about trained gates, and --method alora has none"),
        (["--method", "prefix", "--rank", 65], "--rank 65 is above 64, four times the encoder's width"),
        (["--method", "prompt", "--rank", 41], "--rank 41 leaves room for 5 tokens of a row: take a shorter prompt"),
        (["--device", "meta"], "no device 'meta' here"),
        (["--device", "cuda:99"], "no device 'cuda:99' here"),
        (["--device", "abacus"], "no device 'abacus' here"),
        (["--method", "lora", "--density", 0.5], "--density is about a budget, and --method lora has none"),
        (["--method", "full", "--no-canonical"], "--canonical is about trained gates"),
        (["--weights", "nowhere"], "no config.json in nowhere"),
        (["--task", "cola"], "task cola needs --data DIR"),
        (["--task", "cola", "--data", "nowhere"], "no file nowhere/train.tsv"),
        (["--resume", "nowhere"], "no settings.json in nowhere; expected the folder of a run"),
        (["--evaluate", "nowhere"], "no settings.json in nowhere; expected the folder of a run"),
        (["--predict", "test.tsv"], "--predict needs --evaluate RUN"),
        (["--predict", ""], "argument --predict: expected a path, got an empty text"),
        (["--weights", ""], "argument --weights: expected a path, got an empty text"),
        (["--dropout", 0.1, 0.1, 0.1], "--dropout takes one rate or two, got 3"),
        (["--rank", 10**25], "--rank 10000000000000000000000000 is above 16, the width of the encoder"),
        (["--device", "hpu"], "no device 'hpu' here"),
        (["--beta", ""], "argument --beta: expected a number, 0 or above, got ''"),
        (["--resume", "nowhere", "--lr", 1], "--resume takes its settings from the run: drop --lr"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(go, tmp_path, capsys, flags, message):
    assert message in refused(capsys, go, *flags)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_says_what_can_be_done(go, tmp_path, capsys, monkeypatch):
    def stop(*values):
        raise KeyboardInterrupt

    for module, name in ((setup, "load_task"), (train_glue_mini, "task_loss")):
        with monkeypatch.context() as now, pytest.raises(SystemExit) as exit_:
            now.setattr(module, name, stop)
            go("--out", tmp_path / "run" / name)
        assert exit_.value.code == 130
        assert capsys.readouterr().err == "\ninterrupted; no epoch was finished\n"


def test_an_svd_that_does_not_converge_is_one_line(go, tmp_path, capsys, monkeypatch):
    def diverge(*values, **options):
        raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", diverge)
    assert "failed to converge" in refused(capsys, go, "--out", tmp_path / "run")


def interrupted_at(word, folder, *flags, **environment):
    """(exit status, what it said on stderr) of a program that gets Ctrl-C once a line with the word is printed."""
    command = [sys.executable, "-u", train_glue_mini.__file__, "--out", folder / "run", *flags]
    program = subprocess.Popen(list(map(str, command)), cwd=folder, env={**os.environ, **environment}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while word not in (line := program.stdout.readline()):
        assert line, program.stderr.read()
    program.send_signal(signal.SIGINT)
    return program.wait(timeout=60), program.stderr.read()


def test_an_interruption_while_torch_is_imported_prints_nothing(tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing')\ntime.sleep(60)\n")
    assert interrupted_at("importing", tmp_path, PYTHONPATH=str(tmp_path)) == (-signal.SIGINT, "")


def test_an_interruption_of_the_program_is_said_in_a_line(tmp_path, wide):
    status, said = interrupted_at("step", tmp_path, "--weights", wide, "--steps", 100_000)
    assert (status, said) == (130, "\ninterrupted; no epoch was finished\n")


def test_a_run_is_evaluated_on_the_device_that_is_asked_for(go, tmp_path):
    go("--out", tmp_path / "run")
    path = tmp_path / "run" / "settings.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda:9"'))
    with pytest.raises(SystemExit):
        go("--evaluate", tmp_path / "run")
    assert "score" in go("--evaluate", tmp_path / "run", "--device", "auto")


def test_a_run_that_is_not_finished_is_not_evaluated(go, tmp_path, capsys):
    go("--out", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    message = refused(capsys, go, "--evaluate", tmp_path / "run")
    assert f"is not finished: go on with --resume {tmp_path / 'run'}" in message


def test_a_run_is_evaluated_from_any_folder(go, tmp_path, monkeypatch, tiny_weights):
    monkeypatch.chdir(tiny_weights.parent)
    summary = go("--weights", tiny_weights.name, "--task", "mini-stsb", "--out", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert go("--evaluate", "run")["score"] == summary["score"]


def test_a_folder_that_cannot_be_made_is_refused_before_training(go, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "file is a file: choose another --out" in refused(capsys, go, "--out", "file")
    assert "Not a directory: 'file/run'" in refused(capsys, go, "--out", "file/run")
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    assert "no settings.json in file; expected the folder of a run" in refused(capsys, go, "--evaluate", "file")


@pytest.mark.parametrize("method", ["salora", "lora", *PEERS])
def test_a_run_that_diverges_ends_with_the_step_and_what_to_do(go, capsys, method):
    message = refused(capsys, go, "--method", method, "--lr", 1e30)
    assert "error: the loss is nan at step " in message and message.endswith(": try a smaller --lr")


def test_under_torchrun_a_process_takes_the_cuda_device_of_its_own_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(ValueError, match="no device 'cuda:99' here"):
        device_of("cuda")
    assert device_of("cpu") == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda_is_refused(go, capsys):
    assert "no device 'cuda' here" in refused(capsys, go, "--device", "cuda")


def test_an_official_task_without_an_encoder_is_refused(tmp_path, capsys):
    (tmp_path / "train.tsv").write_text("s\t1\t\ta\n")
    (tmp_path / "dev.tsv").write_text("s\t1\t\ta\n")
    call = lambda *flags: main([str(flag) for flag in flags])  # noqa: E731
    message = refused(capsys, call, "--task", "cola", "--data", tmp_path)
    assert "task cola needs --weights DIR" in message


def test_a_damaged_adapter_is_refused_and_left_alone(go, tmp_path, capsys):
    go("--out", tmp_path / "run")
    path = tmp_path / "run" / "adapter.pt"
    for content in (b"", b"noise", b"hello world", b"version 1", path.read_bytes()[:1000]):
        path.write_bytes(content)
        assert "adapter.pt is damaged" in refused(capsys, go, "--evaluate", path.parent)
        assert path.read_bytes() == content
    torch.save([1], path)
    assert "not a SaLoRA adapter" in refused(capsys, go, "--evaluate", path.parent)


def test_damaged_and_foreign_checkpoints_are_refused_and_left_alone(go, tmp_path, capsys):
    go("--out", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    assert f"no {path}: the run is finished, or" in refused(capsys, go, "--resume", path.parent)
    for content in (b"", b"noise", b"PK\x03\x04 half a zip file"):
        path.write_bytes(content)
        assert "checkpoint.pt is damaged" in refused(capsys, go, "--resume", path.parent)
        assert path.read_bytes() == content
    torch.save({"format": "another"}, path)
    assert "checkpoint.pt is not a checkpoint of this program" in refused(capsys, go, "--resume", path.parent)
    torch.save([1], path)
    assert "is not a checkpoint of this program" in refused(capsys, go, "--resume", path.parent)
    for settings in ("{", "[]", "null", '{"task": "mini-cola"}'):
        (path.parent / "settings.json").write_text(settings)
        for flag in ("--resume", "--evaluate"):
            assert "settings.json is damaged" in refused(capsys, go, flag, path.parent)


def test_an_encoder_without_room_for_the_words_is_refused(go, tmp_path, tiny_weights, capsys):
    from tiny_transformer import TinyTransformer, TransformerConfig, save_pretrained

    config = TransformerConfig(20, 8, 1, 1, 8, 48, 2)
    save_pretrained(TinyTransformer(config), tmp_path / "small")
    assert "no tokenizer.json, vocab.json or vocab.txt in" in refused(capsys, go, "--weights", tmp_path / "small")


# Official files with a checkpoint of the usual layout


def test_an_official_task_runs_with_a_bert_checkpoint(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a good bad film . very".split()
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
    words = [(f"{'very ' * (i % 3)}{word}", label) for i in range(20) for word, label in (("good", 1), ("bad", 0))]
    rows = ["sentence\tlabel"] + [f"a {text} film .\t{label}" for text, label in words]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    flags = ["--task", "sst2", "--data", ".", "--weights", "bert", "--lr", "0.02", "--epochs", "12", "--device", "cpu"]
    summary = main([*flags, "--batch-size", "8"])
    assert summary["score"] == 1.0 and summary["density_kept"] <= 0.5
    assert "tensors not used: classifier.bias" in capsys.readouterr().out
