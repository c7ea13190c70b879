"""The main job as a user meets it, but in this process and at tiny size: what it trains, writes, says and resumes."""

import contextlib
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from main_job import FILES, adapter_of, interrupt, json_of, log_of, losses_of, main_job, names

import rank_allocator
import train_glue_mini
from budget import GateSchedule
from cli import report
from cli.flags import build_parser, device_of
from cli.journal import Journal
from cli.settings import settle
from cli.workers import share_of
from glue.mini import TASKS as MINI_TASKS
from glue.tasks import NAMES
from hard_concrete import HardConcreteGate
from hub.roberta import save_pretrained
from peers import METHODS
from peers.fixed_ranks import FixedRanks
from salora import adapt, salora_layers
from tiny_transformer import TinyTransformer, TransformerConfig

KEYS = {
    "task", "method", "metric", "score", "budget", "density_expected", "density_kept", "adapter_params_total",
    "adapter_params_kept", "ranks", "steps", "seconds", "seed", "device", "command", "versions", "adapter_digest",
    "frozen_digest",
}  # fmt: skip
LOW_RANK = [name for name, method in METHODS.items() if method.low_rank]


@pytest.fixture(scope="module")
def run(tiny_weights, tmp_path_factory):
    """A default run with a trace: its folder, its summary and what it said."""
    folder = tmp_path_factory.mktemp("default") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        summary = main_job("--trace", "--out", folder, weights=tiny_weights)
    return SimpleNamespace(folder=folder, summary=summary, said=said.getvalue())


@pytest.fixture(scope="module", params=METHODS)
def trained(request, tiny_weights, tmp_path_factory):
    """A run of every method on a few rows that it can learn by heart, and its model before and after."""
    method, seen, fine_tune = request.param, {}, train_glue_mini.fine_tune

    def watched(model, *rest, **more):
        seen["frozen"] = {n: p for n, p in model.named_parameters() if not p.requires_grad and ".gate." not in n}
        seen["before"] = {name: p.clone() for name, p in seen["frozen"].items()}
        seen["model"] = model
        return fine_tune(model, *rest, **more)

    folder = tmp_path_factory.mktemp(method) / "run"
    flags = ["--task", "mini-sst2", "--method", method, "--steps", 60, "--rows", 16, "--batch-size", 16]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_glue_mini, "fine_tune", watched)
        summary = main_job(*flags, "--lr", max(8e-3, METHODS[method].lr[0]), "--out", folder, weights=tiny_weights)
    return SimpleNamespace(method=method, folder=folder, summary=summary, **seen)


# What a run leaves behind


def test_every_task_runs_within_its_budget_and_ends_up_in_a_table(go, tmp_path, capsys):
    runs = go("--task", "all", "--seed", 5)["runs"]
    assert [run["task"] for run in runs] == list(MINI_TASKS)
    for run in runs:
        folder = tmp_path / "runs" / "all-salora" / f"{run['task']}-s5"
        assert set(run) == KEYS | {"recipe"} and json_of(folder) == run
        assert names(folder) == FILES, "and no checkpoint or temporary file"
        total, kept = run["adapter_params_total"], run["adapter_params_kept"]
        assert total - 48 <= 2 * kept <= total, "kept parameters: at most half, and within one triplet (16 + 32) of it"
        assert run["density_kept"] == kept / total and run["budget"] == 0.5
        assert len(run["ranks"]) == 12 and run["steps"] == 20
        sizes = {"up": 48, "down": 48}
        assert kept == sum(rank * sizes.get(name.split(".")[-1], 32) for name, rank in run["ranks"].items())
        assert [row["phase"] for row in log_of(folder)] == ["before"] * 8 + ["window"] * 2 + ["after"] * 10
    table = capsys.readouterr().out.splitlines()[-10:]
    assert table[0].split()[:3] == ["task", "metric", "score"] and table[-1].startswith("average")


def test_equal_seeds_give_equal_runs_and_others_do_not_whatever_chance_decides(go, tmp_path):
    for method in ("salora", "alora", "rm-lora", "prompt"):
        one = go("--method", method, "--seed", 3, 4, "--steps", 8, "--out", tmp_path / method)["runs"]
        go("--method", method, "--seed", 3, "--steps", 8, "--out", tmp_path / f"{method}-again")
        three, four = (tmp_path / method / f"mini-cola-s{run['seed']}" for run in one)
        assert adapter_of(three) == adapter_of(tmp_path / f"{method}-again") != adapter_of(four)
        assert log_of(three) == log_of(tmp_path / f"{method}-again")


def test_the_start_and_the_status_line_say_what_is_going_on(go, run, capsys):
    assert "mini-cola, salora, seed 0 on cpu: 48 training rows, 100 dev" in run.said
    assert "11,346 parameters, 3,890 trained, 3,584 in adapters" in run.said  # 2 blocks of (4 x 32 + 2 x 48) x 8
    warned = "gate lr 7\nwarning: gates train for 2 of 20 steps; in fewer than 50"
    assert f"gates train from step 8 to 10 of 20, {warned}" in run.said
    assert "step 10/20 | loss 0." in run.said and " | C 0.500 -> 0.5 | kept " in run.said and "/96 | " in run.said
    kept, density = run.summary["adapter_params_kept"], run.summary["density_kept"]
    assert f"kept {kept:,} of 3,584 adapter parameters: {density:.4f}" in run.said
    go("--recipe", "paper")
    assert " -> 0.5 | lambda " in capsys.readouterr().out


@pytest.mark.parametrize("flags,pictures", [("--trace", 3), ("--recipe paper", 2), ("--method full", 1)])
def test_pictures_are_drawn(go, tmp_path, flags, pictures):
    go(*flags.split(), "--steps", 6, "--out", tmp_path / "run", pictures=True)
    drawn = [path for path in (tmp_path / "run").glob("*.png") if path.read_bytes().startswith(b"\x89PNG")]
    assert len(drawn) == pictures and all(path.stat().st_size > 5000 for path in drawn)


def test_a_log_row_is_the_mean_loss_of_the_steps_since_the_last_one():
    """At most 200 rows or so: here one every second step."""
    model = adapt(torch.nn.Sequential(torch.nn.Linear(3, 2)), ["0"], 1, 1)
    optimizer = torch.optim.SGD([model[0].A], lr=0.5)
    allocator, journal = FixedRanks(model, optimizer, 401), Journal(401)
    journal.begin_epoch(0, model, optimizer, allocator)
    for step in range(401):
        journal.add(step, torch.tensor(float(step)), optimizer, allocator, 8)
    assert [row["step"] for row in journal.rows] == [*range(2, 401, 2), 401], "and the last step has one of its own"
    assert [row["loss"] for row in journal.rows] == [*(step + 0.5 for step in range(0, 400, 2)), 400]
    assert {row["lr"] for row in journal.rows} == {0.5}


def test_a_trace_has_every_matrix_at_every_logged_step_and_changes_no_number(go, tmp_path, run):
    go("--out", tmp_path / "plain")
    assert adapter_of(tmp_path / "plain") == adapter_of(run.folder) and names(tmp_path / "plain") == FILES
    assert names(run.folder) == sorted([*FILES, "trace.csv", "trace.png"])

    log, trace = log_of(run.folder), log_of(run.folder, "trace.csv")
    assert len(trace) == 12 * len(log) and set(trace[0]) == set(report.TRACE)
    for row in log:
        layers = [traced for traced in trace if traced["step"] == row["step"]]
        sizes = [48 if traced["layer"].endswith(("up", "down")) else 32 for traced in layers]
        expected = sum(float(traced["open"]) * size for traced, size in zip(layers, sizes))
        assert expected / 3584 == pytest.approx(float(row["C"]), abs=1e-5), "Eq. (11)"
        assert all(len(json.loads(traced["log_theta"])) == int(traced["rank"]) for traced in layers)
    assert {traced["layer"]: int(traced["rank"]) for traced in layers} == run.summary["ranks"]
    saved = torch.load(run.folder / "adapter.pt", weights_only=True)["layers"]
    for traced in layers:
        A, B = (saved[traced["layer"]][side] for side in "AB")
        orth_A, orth_B = (torch.dist(gram, torch.eye(len(A))) ** 2 for gram in (A @ A.T, B.T @ B))
        assert (orth_A.item(), orth_B.item()) == pytest.approx((float(traced["orth_A"]), float(traced["orth_B"])), 1e-4)


def test_the_table_of_ranks_has_a_line_per_block_and_a_column_per_matrix():
    ranks = {"encoder.layers.0.up": 3, "encoder.layers.0.down": 12, "encoder.layers.10.up": 0}
    assert report.rank_table(ranks).splitlines() == [
        "rank         up   down",
        "block 0       3     12",
        "block 10      0      -",
    ]
    assert report.rank_table({"query": 5}).splitlines() == ["rank      query", "block 0       5"]


# Methods


def test_loss_falls(trained):
    losses = [float(row["loss"]) for row in log_of(trained.folder)]
    if trained.method != "head":
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_method_trains_what_it_says_and_no_frozen_weight_moves(trained):
    state = torch.load(trained.folder / "adapter.pt", weights_only=True)
    assert any(name.startswith("classifier") for name in state["others"]), "every method trains the head"
    assert any(name.startswith("encoder") for name in state["others"]) == (trained.method not in [*LOW_RANK, "head"])
    assert bool(state["layers"]) == (trained.method in LOW_RANK)
    assert all(torch.equal(before, trained.frozen[name]) for name, before in trained.before.items())
    assert bool(trained.before) == (trained.method not in ("full", "child-tuning"))


def test_what_is_left_of_a_method_is_plain_lora_or_says_that_it_has_no_ranks(trained):
    summary, layers = trained.summary, salora_layers(trained.model).values()
    assert set(summary) == KEYS | ({"recipe"} if trained.method == "salora" else set())
    if trained.method in LOW_RANK:
        assert all(type(layer.gate) is HardConcreteGate for layer in layers)
        assert all(torch.equal(layer.gate.settled(), torch.ones(layer.r)) and layer.scale == 2 for layer in layers)
        assert summary["budget"] == (0.5 if METHODS[trained.method].budgeted else 1)
        assert 0 < summary["density_kept"] <= 1 and sum(summary["ranks"].values()) > 0
    else:
        assert summary["ranks"] == {} and summary["adapter_params_total"] == 0 and not layers
        assert summary["density_kept"] is summary["density_expected"] is summary["budget"] is None


def test_lora_is_salora_with_its_gates_open(go, tmp_path):
    """The same code path: an empty window at the end and a budget of 1 change nothing but the state of the gates."""
    lora = go("--method", "lora", "--out", tmp_path / "a")
    same = go("--budget", 1, "--window", 1, 1, "--no-canonical", "--spread", 0, "--out", tmp_path / "b")
    assert (same["score"], same["ranks"]) == (lora["score"], lora["ranks"])
    a, b = (adapter_of(tmp_path / name) for name in "ab")
    for name, layer in a.items():
        for key in ("A", "B") if isinstance(layer, dict) else ():
            assert layer[key] == b[name][key]
        assert isinstance(layer, dict) or layer == b[name]


def test_alora_scores_by_the_negative_loss_of_rows_that_it_does_not_train_on(go, monkeypatch):
    seen, fine_tune, prepare = {}, train_glue_mini.fine_tune, train_glue_mini.prepare

    def watched(model, rows, optimizer, allocator, **more):
        held_out = [row for row in seen["train"] if row not in rows]
        assert len(rows) == 42 and len(held_out) == 6, "an eighth of 48 rows"
        (ids, mask, types), labels = train_glue_mini.batch_of(held_out, model, "cpu")
        loss = torch.nn.functional.cross_entropy(model.eval()(ids, mask, types), labels)
        model.train()
        assert allocator.score() == pytest.approx(-loss.item()) and model.training
        return fine_tune(model, rows, optimizer, allocator, **more)

    def noted(settings):
        model, seen["train"], dev = prepare(settings)
        return model, seen["train"], dev

    monkeypatch.setattr(train_glue_mini, "fine_tune", watched)
    monkeypatch.setattr(train_glue_mini, "prepare", noted)
    go("--method", "alora", "--rank", 2, "--steps", 12, "--dropout", 0.5)


def test_child_tuning_chooses_its_weights_by_the_loss_of_every_training_row(go, monkeypatch):
    fine_tune = train_glue_mini.fine_tune

    def watched(model, rows, optimizer, allocator, **more):
        losses = list(allocator.losses())
        inputs, labels = train_glue_mini.batch_of(rows, model, "cpu")
        whole = torch.nn.functional.cross_entropy(model(*inputs), labels).item()
        assert len(losses) == 6 and torch.stack(losses).mean().item() == pytest.approx(whole), "six batches of 8 rows"
        return fine_tune(model, rows, optimizer, allocator, **more)

    monkeypatch.setattr(train_glue_mini, "fine_tune", watched)
    go("--method", "child-tuning", "--steps", 2, "--dropout", 0)


def test_the_quantized_base_of_a_run_is_part_of_its_fingerprint(go, tmp_path, tiny_weights, capsys):
    """Its codes count as frozen weights; and ranks are decided over it as over any base."""
    summary = go("--quantize", "nf4", "--out", tmp_path / "run")
    assert " parameters (two in 4 bits count as one), 3,890 trained, 3,584 in adapters" in capsys.readouterr().out
    plain = go("--out", tmp_path / "plain")
    assert summary["frozen_digest"] != plain["frozen_digest"]
    assert summary["density_kept"] <= 0.5 and summary["adapter_params_total"] == plain["adapter_params_total"]
    assert json_of(tmp_path / "run", "settings")["quantize"] == "nf4"
    qlora = go("--method", "qlora", "--out", tmp_path / "qlora")
    settings = json_of(tmp_path / "qlora", "settings")
    assert (settings["quantize"], settings["precision"]) == ("nf4", "bf16")
    assert qlora["frozen_digest"] == summary["frozen_digest"]
    for method in LOW_RANK:
        other = go("--quantize", "nf4", "--method", method, "--steps", 8)
        assert other["frozen_digest"] == summary["frozen_digest"] and other["ranks"], method


# Phases


@pytest.mark.equation("alg 1", "noise")
def test_noise_is_drawn_once_a_step_of_the_window_and_gates_move_only_there(go, monkeypatch):
    draws, seen = [], []
    resample, orthogonality = rank_allocator.resample, rank_allocator.orthogonality

    def counted(layers, generator):
        resample(layers, generator)
        draws.append(torch.cat([layer.gate.u for layer in layers.values()]))

    def spy(layers):
        seen.append(torch.cat([layer.gate.log_theta.detach().clone() for layer in layers.values()]))
        return orthogonality(layers)

    monkeypatch.setattr(rank_allocator, "resample", counted)
    monkeypatch.setattr(rank_allocator, "orthogonality", spy)
    go("--recipe", "paper")
    assert len(draws) == 6 and all(not torch.equal(a, b) for a, b in zip(draws, draws[1:], strict=False))
    assert all(not theta.any() for theta in seen[:5]), "log theta stays 0 until the window's first step is done"
    assert all(not torch.equal(a, b) for a, b in zip(seen[4:10], seen[5:10], strict=False))


@pytest.mark.equation("projection", "phases")
def test_the_expected_density_follows_its_target_down_to_the_budget(go, tmp_path):
    go("--window", 0.2, 0.8, "--out", tmp_path / "run")
    schedule = GateSchedule(20, 0.2, 0.8)
    window = [row for row in log_of(tmp_path / "run") if row["phase"] == "window"]
    expected = [schedule.target_at(int(row["step"]) - 1, 0.5) for row in window]
    assert [float(row["C"]) for row in window] == pytest.approx(expected, abs=1e-4)
    assert len(window) == 12 and expected[0] > 0.8 and expected[-1] == 0.5


# Resume: six epochs of six steps and one of four; the window of `ours` is steps 16 to 20, that of `paper` 8 to 20


RESUMED = {
    "salora-before": ("--trace", 8),
    "paper-window": ("--recipe paper", 14),
    "lora-after": ("--method lora", 31),
    "adalora-window": ("--method adalora", 16),
    "alora-after": ("--method alora --rank 4", 31),
    "bf16-accumulate-window": ("--precision bf16 --accumulate 2", 18),
    "nf4-window": ("--quantize nf4", 18),
    "child-tuning-after": ("--method child-tuning", 16),
    "mam-after": ("--method mam", 16),
    "propelt-adapter-after": ("--method propelt-adapter", 16),
    "propelt-prefix-after": ("--method propelt-prefix", 16),
    "propelt-lora-after": ("--method propelt-lora", 16),
    "qlora-after": ("--method qlora", 16),
}


@pytest.mark.parametrize("flags,stop", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(go, tmp_path, monkeypatch, flags, stop):
    flags = ["--steps", 40, "--dropout", 0.1, *flags.split()]
    parts = 2 if "--accumulate" in flags else 1
    first = 6 if "child-tuning" in flags else 0  # the losses by which it chooses what trains
    whole = go(*flags, "--out", tmp_path / "whole")
    interrupt(go, *flags, "--out", tmp_path / "part", after=first + parts * (stop - 1))
    assert names(tmp_path / "part") == ["checkpoint.pt", "settings.json"]
    add, done = Journal.add, []
    monkeypatch.setattr(Journal, "add", lambda journal, step, *rest: (done.append(step), add(journal, step, *rest)))
    resumed = go("--resume", tmp_path / "part")
    assert done == list(range((stop - 1) // 6 * 6, 40)), "only what was lost is done again"
    assert {**resumed, "seconds": 0, "command": ""} == {**whole, "seconds": 0, "command": ""}
    assert adapter_of(tmp_path / "part") == adapter_of(tmp_path / "whole")
    for name in {"log.csv", "trace.csv"} & set(names(tmp_path / "whole")):
        assert (tmp_path / "part" / name).read_text() == (tmp_path / "whole" / name).read_text()


# Hardware flags: the same numbers by other means


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """An encoder without dropout, whose micro-batches may therefore differ in nothing but rounding."""
    folder = tmp_path_factory.mktemp("calm")
    torch.manual_seed(0)
    sizes = dict(vocab_size=130, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    save_pretrained(TinyTransformer(TransformerConfig(**sizes, **rates, initializer_range=0.2)), folder)
    return folder


# What decides: gates by gradient and noise, the sensitivity of gradients, a score, Fisher information, trained masks
DECIDING = ["--recipe paper", "--method adalora", "--method alora", "--method child-tuning", "--method propelt-lora"]


@pytest.fixture(scope="module")
def alone(calm, tmp_path_factory):
    """{flags: (folder, summary)} of runs in one process and without parts, to compare with."""
    runs = {}
    for flags in DECIDING:
        folder = tmp_path_factory.mktemp("alone") / "run"
        runs[flags] = folder, main_job(*split_batches(flags, calm), "--out", folder)
    return runs


def split_batches(flags, weights):
    """Flags of a run on batches of 10 rows, which are split 3, 3, 2, 2 by four. The last of an epoch has one row, so
    that of two processes one has no gradient then."""
    run = ["--weights", weights, "--task", "mini-mnli", "--rows", 41, "--steps", 20, "--batch-size", 10]
    return [*run, *flags.split()]


def assert_like(run, folder, summary):
    worst = (losses_of(run[0]) - losses_of(folder)).abs().max()
    assert worst < 1e-5, "a batch in parts is not the whole batch: are the gates the same in all parts?"
    assert run[1]["ranks"] == summary["ranks"]


@pytest.mark.equation("alg 1", "noise")
@pytest.mark.parametrize("flags", DECIDING)
def test_accumulating_equals_the_whole_batch_noise_included(tmp_path, calm, alone, flags):
    summary = main_job(*split_batches(flags, calm), "--accumulate", 4, "--out", tmp_path / "four")
    assert_like(alone[flags], tmp_path / "four", summary)


def test_a_batch_has_no_more_parts_than_rows():
    """A billion of them, empty but for ten, would take minutes."""
    parts = [list(part) for part in share_of(range(10), 10**9)]
    assert parts == [[row] for row in range(10)]


ONE_AFTER_THE_OTHER = """
import atexit, json, os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from main_job import main_job
tasks = "/proc/self/task"
threads = lambda: [open(f"{tasks}/{task}/comm").read().strip() for task in os.listdir(tasks)]
atexit.register(lambda: print("at exit:", threads() if os.path.isdir(tasks) else []))
for flags in json.loads(sys.argv[2]):
    main_job(*flags)
"""


@pytest.mark.equation("alg 1", "noise")
def test_two_processes_train_like_one_and_only_the_first_speaks(tmp_path, calm, alone):
    """No thread of theirs outlives Python, either: now and then it would abort its process, and torchrun then stops the
    one that still writes."""
    (tmp_path / "driver.py").write_text(ONE_AFTER_THE_OTHER)
    runs = {flags: tmp_path / str(i) for i, flags in enumerate(DECIDING)}
    argvs = [[str(x) for x in [*split_batches(flags, calm), "--out", folder]] for flags, folder in runs.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, tmp_path / "driver.py", ROOT, json.dumps(argvs)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mini-mnli, salora, seed 0 on cpu and 1 more") == 1
    assert done.stdout.count("at exit:") == 2 and "gloo" not in done.stdout
    for flags, folder in runs.items():
        assert_like(alone[flags], folder, json_of(folder))
        assert names(folder) == [name for name in FILES if name != "ranks.png" or json_of(folder)["ranks"]]


@pytest.mark.parametrize("method", ["salora", "prefix"])
def test_bf16_computes_in_it_and_trains_weights_in_fp32(tmp_path, calm, method):
    for precision in ("fp32", "bf16"):
        flags = ["--method", method, "--steps", 10, "--precision", precision, "--out", tmp_path / precision]
        main_job(*flags, weights=calm)
    gap = (losses_of(tmp_path / "fp32") - losses_of(tmp_path / "bf16"))[:3, 0].abs()  # before decisions may differ
    assert 0 < gap.max() < 0.05
    state = torch.load(tmp_path / "bf16" / "adapter.pt", weights_only=True)
    triplets = [layer[side] for layer in state["layers"].values() for side in "AB"]
    assert {tensor.dtype for tensor in (*state["others"].values(), *triplets)} == {torch.float32}


def test_recomputing_activations_changes_nothing(go, tmp_path):
    go("--dropout", 0.1, "--out", tmp_path / "one")
    go("--dropout", 0.1, "--recompute", "--out", tmp_path / "again")  # what is computed again must drop the same
    assert adapter_of(tmp_path / "one") == adapter_of(tmp_path / "again")


def test_deterministic_algorithms_are_used_where_they_are_asked_for(go):
    for flags, expected in ((["--deterministic"], True), ([], False)):
        go(*flags, "--steps", 1)
        assert torch.are_deterministic_algorithms_enabled() == expected


def test_under_torchrun_a_process_takes_the_cuda_device_of_its_own_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(ValueError, match="no device 'cuda:99' here"):
        device_of("cuda")
    assert device_of("cpu") == "cpu"


# Flags

CHANGES = [
    "--task mini-sst2", "--method lora", "--rows 32", "--rank 4", "--alpha 8", "--recipe paper", "--budget 0.25",
    "--rule median", "--survivors median", "--no-canonical", "--beta 0.1", "--controller sgd", "--gate-lr 0.02",
    "--window 0.1 0.4", "--epochs 2", "--steps 24", "--batch-size 4", "--lr 1e-4", "--max-length 6", "--seed 1",
    "--precision bf16", "--quantize nf4", "--spread 1", "--warmup 0.2", "--dropout 0.1", "--no-restart",
]  # fmt: skip


def test_every_flag_changes_the_run(tiny_weights, tmp_path):
    """Three epochs of six steps, in a third of which the gates train."""

    def digest(name, *flags):
        length = [] if {"--epochs", "--steps"} & set(flags) else ["--epochs", 3]
        window = [] if {"--window", "--method"} & set(flags) else ["--window", 0.3, 0.7]
        return main_job(*flags, *length, *window, "--out", tmp_path / name, weights=tiny_weights)["adapter_digest"]

    plain = digest("plain")
    assert digest("again") == plain
    assert [flags for flags in CHANGES if digest(flags, *flags.split()) == plain] == []


def test_every_flag_has_help_and_is_either_tried_above_or_must_not_change_the_numbers():
    files = {"--data", "--weights", "--out", "--resume", "--evaluate", "--export", "--predict"}
    hardware = {"--device", "--accumulate", "--recompute", "--eager", "--deterministic", "--trace"}
    elsewhere = {*files, *hardware, "--canonical", "--restart", "--help", "--sparse-lambda"}  # SoRA's: test_peers.py
    actions = build_parser()._actions
    assert all(action.help for action in actions)
    flags = {option for action in actions for option in action.option_strings if option.startswith("--")}
    assert flags - elsewhere == {flag.split()[0] for flag in CHANGES}
    assert all(name in build_parser().format_help() for name in NAMES)


def test_settings_follow_from_task_method_and_recipe(tiny_weights):
    def settings(flags):
        return settle(build_parser().parse_args(["--weights", str(tiny_weights), "--device", "cpu", *flags.split()]))

    paper, ours, full, lora = map(settings, ("--recipe paper", "", "--method full", "--method lora"))
    assert (paper.rule, paper.survivors, paper.canonical, paper.beta) == ("median", "median", False, 0.1)
    assert (ours.rule, ours.survivors, ours.canonical, ours.beta) == ("budget", "one", True, 0.0)
    assert (ours.restart, ours.recipe, ours.epochs, ours.budget, ours.rank) == (True, "ours", 12, 0.5, 8)
    assert settings("--task sst2").epochs == 3 and settings("--steps 5").epochs is None
    given = settings("--recipe paper --rule budget --epochs 5 --rank 4 --lr 0.1")
    assert (given.rule, given.epochs, given.rank, given.lr) == ("budget", 5, 4, 0.1)
    assert (paper.dropout, ours.dropout, full.dropout, lora.dropout) == ([0.1, 0.1], [0, 0], [0.1, 0.1], [0, 0])
    assert (full.rank, full.alpha, lora.budget, lora.recipe) == (None, None, None, None)
    assert settings("--recipe paper").decisions == rank_allocator.Recipe.paper()
    assert vars(settings("--recipe ours")) == vars(ours)
