"""Nothing lost, nothing let in: refusals, and runs that were interrupted, damaged, edited, shared or exported."""

import os
import resource
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from main_job import FILES, copy_of, edit_settings, interrupt, json_of, main_job, names, refused, spoiled_update

import train_glue_mini
from cli import report, setup, table
from cli import settings as cli_settings
from cli.afterwards import reopen
from cli.files import check_free, claimed, digest_of, made
from cli.journal import Journal
from cli.program import Parser, errors_as_lines
from cli.settings import read_settings
from cli.table import append, has_row, read_table, rows_with
from glue import pretrain
from glue.metrics import METRICS
from glue.tasks import task_of
from glue.tokens import MiniTokenizer
from hub.roberta import save_pretrained
from peers import METHODS
from salora import salora_layers
from tiny_transformer import MaskedLM, SequenceClassifier, TinyTransformer, TransformerConfig


@pytest.fixture(scope="module")
def kept(tiny_weights, tmp_path_factory):
    """Folders that tests only read, or copy: of a finished run, and of one that was interrupted in its third epoch."""
    folder = tmp_path_factory.mktemp("kept")
    main_job("--out", folder / "finished", weights=tiny_weights)
    interrupt(main_job, "--weights", tiny_weights, "--out", folder / "interrupted", after=14)
    return SimpleNamespace(finished=folder / "finished", interrupted=folder / "interrupted")


# Bad input

REFUSED = [  # flags, and what the line says
    ("--task mini-snli", "invalid choice: 'mini-snli'"),
    ("--budget 0", "budget must be in (0, 1], got 0.0"),
    ("--method adalora --budget 2", "budget must be in (0, 1], got 2.0"),
    ("--window 0.6 0.5", "0 <= start <= end <= 1, got start=0.6, end=0.5"),
    ("--rank 0", "argument --rank: expected a whole number above 0, got '0'"),
    ("--steps many", "argument --steps: expected a whole number above 0, got 'many'"),
    (f"--epochs {10**400}", "argument --epochs: expected a number below 1e+12"),
    ("--gate-lr fast", "argument --gate-lr: expected a number above 0, got 'fast'"),
    ("--gate-lr 1e38", "argument --gate-lr: expected a number below 1e+36, got '1e38'"),
    ("--lr -1", "argument --lr: expected a number above 0, got '-1'"),
    ("--beta nan", "argument --beta: expected a number, 0 or above, got 'nan'"),
    ("--beta=", "argument --beta: expected a number, 0 or above, got ''"),
    ("--dropout 1.5", "argument --dropout: expected a number from 0 to below 1, got '1.5'"),
    ("--dropout 0.1 0.1 0.1", "--dropout takes one rate or two, got 3"),
    ("--warmup 1", "argument --warmup: expected a number from 0 to below 1, got '1'"),
    ("--max-length 5", "--max-length must be at least 6, room for four special tokens"),
    ("--seed 0 1 0", "--seed takes different numbers below 10^9, got 0 1 0"),
    (f"--seed {10**16}", "--seed takes different numbers below 10^9, got 10000000000000000"),
    ("--epochs 1 --steps 1", "argument --steps: not allowed with argument --epochs"),
    ("--data .", "task mini-cola is generated and reads no --data: drop it, or take --task cola"),
    ("--method full --rank 4", "--rank is about adapters, and --method full has none"),
    ("--method full --quantize nf4", "--quantize is about low-rank adapters, and --method full has none"),
    ("--method head --alpha 4", "--alpha is about low-rank adapters, and --method head has none"),
    ("--method sora --budget 0.5", "--budget is about a budget, and --method sora has none"),
    ("--method adalora --sparse-lambda 1", "--sparse-lambda is about a threshold, and --method adalora has none"),
    ("--method alora --no-canonical", "--canonical is about trained gates, and --method alora has none"),
    (f"--rank {10**11}", "--rank 100000000000 is above 16, the width of the encoder"),
    ("--method prefix --rank 65", "--rank 65 is above 64, four times the encoder's width"),
    ("--method prompt --rank 41", "--rank 41 leaves room for 5 tokens of a row: take a shorter prompt"),
    ("--device meta", "no device 'meta' here"),
    ("--device cuda:99", "no device 'cuda:99' here"),
    ("--device abacus", "no device 'abacus' here"),
    ("--weights nowhere", "nowhere; expected the folder of a RoBERTa or BERT checkpoint"),
    ("--weights=", "argument --weights: expected a path, got an empty text"),
    ("--task cola", "task cola needs --data DIR"),
    ("--task cola --data nowhere", "/nowhere/train.tsv"),
    ("--predict test.tsv", "--predict needs --evaluate RUN"),
    ("--resume nowhere", "no settings.json in nowhere; expected the folder of a run"),
    ("--evaluate nowhere", "no settings.json in nowhere; expected the folder of a run"),
    ("--export nowhere", "no settings.json in nowhere; expected the folder of a run"),
    ("--resume nowhere --lr 1", "--resume takes its settings from the run: drop --lr"),
]


@pytest.mark.parametrize("flags,message", REFUSED, ids=[flags[:40] for flags, _ in REFUSED])
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(go, tmp_path, capsys, flags, message):
    assert message in refused(capsys, go, *flags.split())
    assert list(tmp_path.iterdir()) == []


def test_all_that_can_be_refused_is_refused_before_an_encoder_is_pre_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_settings, "mini_encoder", lambda **_: pytest.fail("it should not have come so far"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "settings.json").write_text('{"task": "mini-cola"}')
    (tmp_path / "loop").symlink_to("loop")
    for flags, message in (
        ("--window 1 0", "0 <= start <= end <= 1"),
        ("--method full --dropout 0 0 0", "--dropout takes one rate or two"),
        ("--out file", "file is a file: choose another --out"),
        ("--out .", "is not empty: choose another --out"),
        ("--resume .", "settings.json is damaged"),
        ("--task cola --data .", "task cola needs --weights DIR"),
        ("--evaluate file", "no settings.json in file; expected the folder of a run"),
        ("--out loop", "loop is a file: choose another --out"),
        ("--weights loop", "loop; expected the folder of a RoBERTa or BERT checkpoint"),
    ):
        assert message in refused(capsys, train_glue_mini.main, flags.split())
    assert (tmp_path / "file").read_text() == "mine" and names(tmp_path) == ["file", "loop", "settings.json"]


def test_an_encoder_without_room_for_the_words_is_refused(go, tmp_path, capsys):
    save_pretrained(TinyTransformer(TransformerConfig(20, 8, 1, 1, 8, 48, 2)), tmp_path / "small")
    assert "no tokenizer.json, vocab.json or vocab.txt in" in refused(capsys, go, "--weights", tmp_path / "small")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_diverges_ends_with_the_step_and_what_to_do(go, capsys, method):
    message = refused(capsys, go, "--method", method, "--lr", 1e30, "--steps", 8)
    assert "error: the loss is nan at step " in message and message.endswith(": try a smaller --lr")


@pytest.mark.parametrize("task", ["mini-stsb", "mini-rte"])
def test_a_model_whose_outputs_are_not_finite_has_no_score(go, tmp_path, capsys, task):
    """Where the weights just are; argmax would choose a class for a NaN as well."""
    flags = ["--task", task, "--method", "full", "--lr", 1e30, "--steps", 1, "--out", tmp_path / "run"]
    message = refused(capsys, go, *flags)
    assert message.endswith("the model's outputs are not finite, since training diverged: try a smaller --lr")
    assert names(tmp_path / "run") == ["settings.json"]


def test_an_svd_that_does_not_converge_is_one_line(go, capsys, monkeypatch):
    error = torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
    monkeypatch.setattr(torch.linalg, "svd", Mock(side_effect=error))
    assert str(error) in refused(capsys, go)


def test_memory_that_is_too_small_is_one_line_which_says_what_to_do(go, capsys, monkeypatch):
    """Also where the recording of a CUDA graph, which it broke off, ends with another error."""

    def recording(*inputs):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    torch_on_a_cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    for effect, text in (
        (torch.OutOfMemoryError("CUDA out of memory."), " CUDA out of memory."),
        (torch_on_a_cpu, f" {torch_on_a_cpu}"), (MemoryError(), ""),
        (recording, " CUDA out of memory. Tried to allocate 2 GiB."),
    ):  # fmt: skip
        monkeypatch.setattr(train_glue_mini, "task_loss", Mock(side_effect=effect))
        message = refused(capsys, go)
        assert message.endswith(f"too little memory: take smaller batches, or what else saves it (see --help).{text}")


def test_warnings_are_lines_while_a_program_runs():
    before = warnings.formatwarning
    with errors_as_lines(Parser()):
        assert warnings.formatwarning("mind the gap", UserWarning, "file.py", 3) == "warning: mind the gap\n"
    assert warnings.formatwarning is before


# Interruptions


def test_an_interruption_says_how_to_go_on(go, tmp_path, kept, capsys, monkeypatch):
    def stop(*values):
        raise KeyboardInterrupt

    for module, name in ((setup, "load_task"), (train_glue_mini, "task_loss")):
        with monkeypatch.context() as now, pytest.raises(SystemExit) as exit_:
            now.setattr(module, name, stop)
            go("--out", tmp_path / "run" / name)
        assert exit_.value.code == 130
        assert capsys.readouterr().err == "\ninterrupted; no epoch was finished\n"
    with monkeypatch.context() as now, pytest.raises(SystemExit) as exit_:
        now.setattr(train_glue_mini, "evaluate", stop)
        go("--evaluate", kept.finished)
    assert exit_.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"
    run = copy_of(kept.interrupted, tmp_path / "begun")
    interrupt(go, "--resume", run, after=2)
    assert capsys.readouterr().err == f"\ninterrupted; go on from the last whole epoch with --resume {run}\n"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_of_the_program_is_said_in_a_line(tmp_path, tiny_weights, end):
    command = [sys.executable, "-u", train_glue_mini.__file__, "--out", "run", "--weights", tiny_weights]
    program = subprocess.Popen([*command, "--steps", "100000"], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    while "step" not in (line := program.stdout.readline()):
        assert line, program.stderr.read()
    program.send_signal(end)
    assert program.wait(timeout=60) == 130 and program.stderr.read() == "\ninterrupted; no epoch was finished\n"


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew_with_the_same_command(go, tmp_path, kept):
    interrupt(go, "--out", tmp_path / "run", after=2)
    assert names(tmp_path / "run") == ["settings.json"]
    again = go("--out", tmp_path / "run")
    assert again["adapter_digest"] == json_of(kept.finished)["adapter_digest"] and names(tmp_path / "run") == FILES


def test_several_runs_of_which_one_ended_before_its_first_checkpoint_start_anew_with_the_same_command(go, tmp_path):
    flags = ["--seed", 0, 1, "--steps", 4, "--out", tmp_path / "runs"]
    interrupt(go, *flags, after=2)
    assert names(tmp_path / "runs") == ["mini-cola-s0"]
    assert len(go(*flags)["runs"]) == 2 and names(tmp_path / "runs") == ["mini-cola-s0", "mini-cola-s1"]


def test_a_run_with_a_checkpoint_is_not_begun_anew_by_mistake(go, kept, capsys):
    before = (kept.interrupted / "checkpoint.pt").read_bytes()
    assert "holds a run that is not finished: --resume it, or" in refused(capsys, go, "--out", kept.interrupted)
    assert (kept.interrupted / "checkpoint.pt").read_bytes() == before


def test_a_run_that_diverges_leaves_no_checkpoint(go, tmp_path, capsys, monkeypatch):
    add = Journal.add

    def diverge(journal, step, *rest):
        if step == 14:
            raise FloatingPointError("the loss is nan")
        add(journal, step, *rest)

    monkeypatch.setattr(Journal, "add", diverge)
    assert "the loss is nan" in refused(capsys, go, "--out", tmp_path / "run")
    assert names(tmp_path / "run") == ["settings.json"], "so that the same command starts anew"


def test_weights_that_are_not_finite_never_replace_a_checkpoint(go, capsys, monkeypatch):
    """Between two looks at the loss a checkpoint falls due."""
    written, save, begin_epoch = [], torch.save, Journal.begin_epoch

    def spoil(journal, step, model, *rest):
        if step == 12:
            next(iter(salora_layers(model).values())).A.data[0, 0] = float("nan")
        begin_epoch(journal, step, model, *rest)

    monkeypatch.setattr(Journal, "begin_epoch", spoil)
    monkeypatch.setattr(torch, "save", lambda state, path: (written.append(state), save(state, path)))
    assert "weights are not finite at step 12" in refused(capsys, go)
    assert [state["journal"]["step"] for state in written] == [6]


@pytest.mark.parametrize("method", ["salora", "lora", "full"])
def test_a_run_that_diverges_in_its_last_update_has_no_score(go, tmp_path, capsys, monkeypatch, method):
    """Whose loss no step sees; predictions of NaN would have one."""
    monkeypatch.setattr(train_glue_mini, "predict", lambda *_: pytest.fail("it should not have come so far"))
    with spoiled_update(20):
        message = refused(capsys, go, "--out", tmp_path / "run", "--method", method)
    assert "weights are not finite at step 20: try a smaller --lr" in message
    assert names(tmp_path / "run") == ["settings.json"]


# Edited, damaged and foreign files


def test_settings_that_were_edited_are_not_resumed(go, tmp_path, kept, capsys):
    run = copy_of(kept.interrupted, tmp_path / "run")
    before = json_of(run, "settings")
    for key, value in {"steps": 10, "batch_size": 4, "rows": 40, "lr": 1e-3, "budget": 0.4}.items():
        edit_settings(run, **{**before, key: value})
        message = refused(capsys, go, "--resume", run)
        assert f"the interrupted run had {key} {before[key]}, but now it is {value}" in message
    edit_settings(run, **before)
    assert go("--resume", run)["steps"] == 20, "and the checkpoint is still there"


@pytest.mark.parametrize("change", [{"budget": 2}, {"rank": "8"}, {"rank": None}, {"window": [0.2]}, {"window": 3},
                                    {"method": "full"}, {"task": ["mini-cola"]}, {"canonical": 1}, {"lr": "fast"},
                                    {"more": 1}, {"seed": 1.5}, {"dropout": [2, 2]}, {"help": True}])  # fmt: skip
def test_settings_that_the_program_would_not_have_written_are_refused(tmp_path, kept, change):
    assert read_settings(kept.finished).budget == 0.5
    (tmp_path / "settings.json").write_bytes((kept.finished / "settings.json").read_bytes())
    edit_settings(tmp_path, **change)
    with pytest.raises(ValueError, match="settings.json is damaged, or of another version"):
        read_settings(tmp_path)


def test_damaged_and_foreign_files_are_refused_and_left_alone(go, tmp_path, kept, capsys):
    run = copy_of(kept.interrupted, tmp_path / "run")
    finished = copy_of(kept.finished, tmp_path / "finished")
    path, adapter = run / "checkpoint.pt", finished / "adapter.pt"
    saved = torch.load(path, weights_only=True)
    altered = [{**saved, part: {**saved[part], "more": 1}} for part in ("adapter", "optimizer", "allocator", "journal")]
    for where, flag, content, message in (
        *((path, "--resume", data, "checkpoint.pt is damaged or not") for data in (b"", b"noise", b"PK\x03\x04 half")),
        *((path, "--resume", state, "is damaged: what it holds is not what was saved") for state in altered),
        (path, "--resume", {**saved, "adapter": torch.ones(1).expand(10**7, 10**7)}, "is damaged: what it holds"),
        (path, "--resume", {"format": "another"}, "checkpoint.pt is not a checkpoint of this program"),
        (path, "--resume", [1], "checkpoint.pt is not a checkpoint of this program"),
        *((adapter, "--evaluate", data, "adapter.pt is damaged") for data in (b"", b"version 1", b"PK\x03\x04 half")),
        (adapter, "--evaluate", [1], "not a SaLoRA adapter"),
        *((run / "settings.json", "--resume", text, "settings.json is damaged") for text in (b"{", b"[]", b"null")),
        (finished / "settings.json", "--evaluate", b"{}", "settings.json is damaged"),
    ):
        where.write_bytes(content) if isinstance(content, bytes) else torch.save(content, where)
        before = where.read_bytes()
        assert message in refused(capsys, go, flag, where.parent)
        assert where.read_bytes() == before


def test_other_weights_in_the_encoders_folder_and_another_adapter_are_noticed(go, tmp_path, tiny_weights, capsys):
    weights = copy_of(tiny_weights, tmp_path / "weights")
    for seed in (0, 1):
        go("--out", tmp_path / f"run{seed}", "--weights", weights, "--seed", seed, "--steps", 8)
    interrupt(go, "--out", tmp_path / "part", "--weights", weights, after=14)
    finished = copy_of(tmp_path / "run0", tmp_path / "run2")
    (finished / "adapter.pt").write_bytes((tmp_path / "run1" / "adapter.pt").read_bytes())
    assert "adapter.pt is not the adapter that the run left there" in refused(capsys, go, "--evaluate", finished)
    tensors = torch.load(weights / "pytorch_model.bin", weights_only=True)
    next(iter(tensors.values())).add_(1)
    torch.save(tensors, weights / "pytorch_model.bin")
    assert "holds other weights than those that the run in" in refused(capsys, go, "--evaluate", tmp_path / "run0")
    assert "the interrupted run had frozen weights " in refused(capsys, go, "--resume", tmp_path / "part")


def test_matrices_that_lose_all_triplets_are_no_weights_of_the_encoder(go, tmp_path):
    """Also where the cut comes before the first checkpoint."""
    flags = ["--window", 0, 0.1, "--budget", 0.02]
    whole = go(*flags, "--out", tmp_path / "whole")
    assert 0 in whole["ranks"].values()
    assert go("--evaluate", tmp_path / "whole")["score"] == whole["score"]
    interrupt(go, *flags, "--out", tmp_path / "part", after=7)
    assert go("--resume", tmp_path / "part")["adapter_digest"] == whole["adapter_digest"]


def test_a_run_is_resumed_where_its_data_lies_now_but_not_with_other_labels(go, tmp_path, capsys, monkeypatch):
    def write(folder, labels):
        folder.mkdir(exist_ok=True)
        rows = [f"the dog sees a cat .\t{labels[i % 2]}" for i in range(48)]
        for name in ("train", "dev"):
            (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]))

    monkeypatch.setattr(setup, "tokenizer_for", lambda *_: MiniTokenizer())
    write(tmp_path / "here", "01")
    interrupt(go, "--task", "sst2", "--data", "here", "--out", "run", after=7)
    write(tmp_path / "here", "10")
    message = refused(capsys, go, "--resume", "run")
    assert "the interrupted run had training rows 48, digest " in message
    (tmp_path / "here").rename(tmp_path / "there")
    write(tmp_path / "there", "01")
    monkeypatch.chdir("there")
    assert f"no file {tmp_path / 'here'}" in refused(capsys, go, "--resume", tmp_path / "run")
    assert go("--resume", tmp_path / "run", "--data", ".")["steps"] == 20


def test_a_picture_that_cannot_be_drawn_costs_a_line_and_not_the_run(go, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw_training", Mock(side_effect=RuntimeError("latex could not be found")))
    summary = go("--out", tmp_path / "run", pictures=True)
    assert "warning: there is no " in (said := capsys.readouterr().out) and "latex could not be found" in said
    assert names(tmp_path / "run") == [name for name in FILES if name != "training.png"]
    assert go("--evaluate", tmp_path / "run")["score"] == summary["score"]


def test_equal_digests_mean_equal_content():
    values = [torch.ones(2), torch.ones(2, 1), torch.ones(2).double(), torch.ones(())]
    values += [[1.0, 1.0], (1.0, 1.0), [[1.0], 1.0], "1", 1, {"a": 1}, {"b": 1}]
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of({"a": torch.ones(2).bfloat16()}) == digest_of({"a": torch.ones(4)[::2].bfloat16()})


# Folders and files


@pytest.mark.parametrize("found,free", [
    ("", True), ("settings.json", True), ("settings.json.part", True), ("settings.json checkpoint.pt.part", True),
    ("settings.json adapter.pt log.csv training.png.part", True), ("settings.json checkpoint.pt", False),
    ("settings.json summary.json", False), ("settings.json notes.txt", False), ("adapter.pt", False),
])  # fmt: skip
def test_a_folder_is_free_if_it_holds_nothing_but_what_an_early_end_leaves(tmp_path, found, free):
    for name in found.split():
        (tmp_path / name).touch()
    if not free:
        with pytest.raises(FileExistsError, match="choose another --out"):
            check_free(tmp_path)
    else:
        check_free(tmp_path)


def test_default_folders_are_numbered_on_and_a_given_one_is_never_overwritten(go, tmp_path, capsys):
    folder = tmp_path / "runs" / "mini-cola-salora-s0"
    folder.mkdir(parents=True)
    (folder / "mine").touch()
    go("--steps", 2)
    (tmp_path / "more" / "mini-cola-s7").mkdir(parents=True)
    (tmp_path / "more" / "mini-cola-s7" / "mine").touch()
    assert names(folder.parent) == [folder.name, f"{folder.name}-1"]
    for flags in ([], ["--seed", 0, 1]):
        assert "is not empty: choose another --out" in refused(capsys, go, "--out", folder, *flags)
    assert "mini-cola-s7 is not empty: choose" in refused(capsys, go, "--out", tmp_path / "more", "--seed", 7, 8)
    assert names(folder) == ["mine"]


def test_a_folder_is_one_runs_alone_until_that_ends(go, tmp_path, capsys):
    with claimed(tmp_path / "run", new=True):
        assert "another run is at work in" in refused(capsys, go, "--out", tmp_path / "run")
    assert go("--out", tmp_path / "run", "--steps", 2)["steps"] == 2


def test_a_claimed_folder_into_which_nothing_came_is_gone_again(tmp_path):
    with pytest.raises(ValueError), claimed(tmp_path / "a" / "b", new=True):
        raise ValueError
    assert names(tmp_path) == []


@pytest.mark.parametrize("kilobytes", [0, 4, 20])
def test_a_full_disk_ends_the_run_with_one_line_and_no_half_file(go, tmp_path, capsys, kilobytes):
    """A limit on the size of files stands for the disk: the settings, a checkpoint or the adapter does not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, before[1]))
    try:
        message = refused(capsys, go, "--out", tmp_path / "run", "--steps", 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written: " in message and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("kilobytes", [0, 1, 50])
def test_a_full_disk_while_an_encoder_is_pre_trained_is_one_line_and_leaves_no_half_encoder(tmp_path, capsys, kilobytes,
                                                                                            monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "pretrain", lambda device: MaskedLM(TinyTransformer(pretrain.MINI)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, before[1]))
    try:
        message = refused(capsys, train_glue_mini.main, ["--device", "cpu"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ("File too large" in message or "cannot be written: " in message) and not list(tmp_path.glob("runs/*"))


def test_a_full_disk_during_an_export_is_one_line(go, tmp_path, kept, capsys, monkeypatch):
    """safetensors has an error of its own for it."""
    torch_file = pytest.importorskip("safetensors.torch")
    error = pytest.importorskip("safetensors").SafetensorError("I/O error: No space left on device")
    monkeypatch.setattr(torch_file, "save_file", Mock(side_effect=error))
    message = refused(capsys, go, "--export", copy_of(kept.finished, tmp_path / "run"))
    assert "cannot be written: I/O error: No space left on device" in message


def test_closed_standard_output_is_one_line(go, capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as now, open(writer, "w") as closed:
        now.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as exit_:
            go()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "train_glue_mini.py: error: standard output was closed\n"


def test_a_file_in_the_place_of_a_folder_is_refused_before_anything_long(go, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for module, name in ((train_glue_mini, "prepare"), (pretrain, "pretrain")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it should not have come so far"))
    assert "file is a file: choose another --out" in refused(capsys, go, "--out", tmp_path / "file" / "run")
    with pytest.raises(OSError):
        pretrain.mini_encoder(tmp_path / "file")
    for folder in (tmp_path / "file", tmp_path / "file" / "study"):
        with pytest.raises(NotADirectoryError, match="file is a file: choose another --out"), made(folder):
            pass


def test_a_table_grows_by_rows_and_knows_which_runs_are_done(tmp_path):
    path = tmp_path / "table.csv"
    assert read_table(path) == [] and not has_row(path, seed=0)
    for seed in (0, 1):
        append(path, {"arm": "lora-4", "seed": seed, "loss": 0.5 + seed})
    assert path.read_text().splitlines() == ["arm,seed,loss", "lora-4,0,0.5", "lora-4,1,1.5"]
    assert rows_with(path, arm="lora-4", seed=1) == [{"arm": "lora-4", "seed": "1", "loss": "1.5"}]
    assert has_row(path, seed=0) and not has_row(path, arm="lora-8", seed=0)
    for empty in ("", "\n", "\r\n\r\n", "arm,se"):
        (tmp_path / "empty.csv").write_text(empty)
        append(tmp_path / "empty.csv", {"arm": "lora-4", "seed": 0})
        assert read_table(tmp_path / "empty.csv") == [{"arm": "lora-4", "seed": "0"}]
    append(path, {"loss": 2.5, "seed": 2, "arm": "lora-8"})
    assert path.read_text().splitlines()[-1] == "lora-8,2,2.5", "whatever the order of a row"
    with pytest.raises(ValueError, match="table.csv has other columns than arm, score: choose another --out"):
        append(path, {"arm": "lora-4", "score": 1})


@pytest.mark.parametrize("trouble", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_of_several_rows_all_are_added_or_none(tmp_path, monkeypatch, trouble):
    rows, path = [{"arm": f"lora-{r}", "loss": 0.5} for r in (4, 8, 16)], tmp_path / "table.csv"
    write_all = table.write_all

    def write_some(file, data):
        write_all(file, data[:size])
        raise trouble

    for done in ([], rows):
        if done:
            append(path, *done)
        for size in range(40):
            with monkeypatch.context() as now, pytest.raises((KeyboardInterrupt, OSError)):
                now.setattr(table, "write_all", write_some)
                append(path, *rows)
            assert len(read_table(path)) == len(done)


# Afterwards


def test_a_summary_and_settings_say_what_was_run_with_what(go, tmp_path, kept):
    go("--out", tmp_path / "paper", "--recipe", "paper", "--steps", 10)
    go("--out", tmp_path / "full", "--method", "full", "--steps", 10)
    summary, settings = json_of(tmp_path / "paper"), json_of(tmp_path / "paper", "settings")
    assert summary["recipe"] == "paper" and summary["command"].startswith("train_glue_mini.py --out ")
    assert set(summary["versions"]) == {"python", "torch", "numpy"}
    assert settings["gate_lr"] == 0.01 and settings["dropout"] == [0.1, 0.1]
    ours, full = json_of(kept.finished, "settings"), json_of(tmp_path / "full", "settings")
    assert ours["gate_lr"] == 7 and ours["dropout"] == [0, 0], "the values that were used, and not auto"
    assert "recipe" not in full and "gate_lr" not in full and full["dropout"] == [0.1, 0.1]
    assert None not in [*settings.values(), *ours.values(), *full.values()]


def test_a_finished_run_scores_the_same_again_from_any_folder_and_stays_as_it_is(go, tmp_path, tiny_weights, capsys,
                                                                                 monkeypatch):  # fmt: skip
    monkeypatch.chdir(tiny_weights.parent)
    summary = go("--weights", tiny_weights.name, "--task", "mini-stsb", "--out", tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.chdir(tmp_path)
    assert go("--evaluate", "run") == {"task": "mini-stsb", "metric": "pearson", "score": summary["score"]}
    assert "mini-stsb: pearson " in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    edit_settings(tmp_path / "run", device="cuda:9")
    assert "no device 'cuda:9' here" in refused(capsys, go, "--evaluate", "run")
    assert go("--evaluate", "run", "--device", "cpu")["score"] == summary["score"]


def test_a_run_that_is_not_finished_is_neither_evaluated_nor_exported(go, kept, capsys):
    for flag in ("--evaluate", "--export"):
        message = refused(capsys, go, flag, kept.interrupted)
        assert f"is not finished: go on with --resume {kept.interrupted}" in message
    message = refused(capsys, go, "--resume", kept.finished)
    assert f"no {kept.finished / 'checkpoint.pt'}: the run is finished, or" in message


def test_predictions_are_what_glue_wants_submitted(go, tmp_path, kept, capsys):
    rows = ["the dog chased the cat .", "the film was dull .", "cat the the ."] * 3
    run, test = copy_of(kept.finished, tmp_path / "run"), tmp_path / "test.tsv"
    test.write_text("index\tsentence\n" + "".join(f"{i}\t{row}\n" for i, row in enumerate(rows)))
    go("--evaluate", run, "--predict", test)
    lines = (run / "CoLA.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [*map(str, range(9))]
    answers = [line.split("\t")[1] for line in lines[1:]]
    assert set(answers) <= {"0", "1"} and answers[:3] == answers[3:6] == answers[6:]
    said = capsys.readouterr().out
    assert "9 rows of" in said and "matthews" not in said, "there is nothing to score"
    test.write_text("index\ttext\n0\ta\n")
    assert "has no column sentence" in refused(capsys, go, "--evaluate", run, "--predict", test)


def test_rows_with_labels_are_scored_and_replace_no_submission(go, tmp_path, kept, capsys):
    run, rows = copy_of(kept.finished, tmp_path / "run"), [("the dog sees a cat .", 1), ("dog the the .", 0)] * 4
    numbered = [f"{i}\t{text}\n" for i, (text, _) in enumerate(rows)]
    (tmp_path / "test.tsv").write_text("index\tsentence\n" + "".join(numbered))
    (tmp_path / "dev.tsv").write_text("".join(f"x\t{label}\t\t{text}\n" for text, label in rows))
    go("--evaluate", run, "--predict", tmp_path / "test.tsv")
    submitted = (run / "CoLA.tsv").read_text()
    capsys.readouterr()
    result = go("--evaluate", run, "--predict", tmp_path / "dev.tsv")
    assert result["predictions"] == str(run / "CoLA.dev.tsv")
    assert (run / "CoLA.dev.tsv").read_text() == (run / "CoLA.tsv").read_text() == submitted
    predicted = [int(line.split("\t")[1]) for line in submitted.splitlines()[1:]]
    assert result["score"] == METRICS["matthews"](predicted, [label for _, label in rows])
    assert f"matthews {result['score']:.4f} on 8 rows of {tmp_path / 'dev.tsv'}" in capsys.readouterr().out


@pytest.mark.parametrize("task,test,predicted,file,lines", [
    ("mnli", "test_matched.tsv", [2, 0], "MNLI-m.tsv", ["0\tcontradiction", "1\tentailment"]),
    ("mnli", "test_mismatched.tsv", [1], "MNLI-mm.tsv", ["0\tneutral"]),
    ("mnli", "diagnostic.tsv", [1], "AX.tsv", ["0\tneutral"]),
    ("mnli", "dev_matched.tsv", [1], "MNLI.dev_matched.tsv", ["0\tneutral"]),
    ("mnli", "m.tsv", [1], "MNLI.m.tsv", ["0\tneutral"]),
    ("rte", "dev.tsv", [1], "RTE.dev.tsv", ["0\tnot_entailment"]),
    ("stsb", "test.tsv", [5.3, 1.23456], "STS-B.tsv", ["0\t5.000", "1\t1.235"]),
])  # fmt: skip
def test_predictions_use_the_names_of_labels_and_of_what_was_labeled(tmp_path, task, test, predicted, file, lines):
    path = report.write_predictions(tmp_path, task_of(task), test, predicted)
    assert path.name == file and path.read_text().splitlines() == ["index\tprediction", *lines]


def test_mnli_is_scored_on_both_kinds_of_dev_rows(go, tmp_path, monkeypatch, capsys):
    texts = {"entailment": "the dog sees a cat .", "neutral": "the film was dull .", "contradiction": "a a a"}
    for name, part in (("train", 3), ("dev_matched", 3), ("dev_mismatched", 2)):
        rows = [f"{text}\tthe dog .\t{label}" for label, text in list(texts.items())[:part]] * 4
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tgold_label", *rows]))
    monkeypatch.setattr(setup, "tokenizer_for", lambda *_: MiniTokenizer())
    run = tmp_path / "run"
    summary = go("--task", "mnli", "--data", tmp_path, "--rows", 12, "--out", run)
    result = go("--evaluate", run)
    said = capsys.readouterr().out
    assert result["score"] == summary["score"] and "on 12 dev rows with" in said
    assert f"accuracy {result['dev_mismatched']:.4f} on 8 rows of dev_mismatched.tsv" in said


@pytest.mark.parametrize("method", METHODS)
def test_a_run_opens_again_with_the_same_score_and_what_is_exported_with_the_same_outputs(go, tmp_path, capsys, method):
    run, adds_modules = tmp_path / "run", METHODS[method].adds_modules
    summary = go("--out", run, "--method", method, "--steps", 10)
    assert go("--evaluate", run)["score"] == summary["score"]
    assert (f"{method} adds modules to the encoder: the run can be eval" in capsys.readouterr().out) == adds_modules
    before = names(run)
    if adds_modules:
        assert f"--method {method} adds modules to the encoder, which" in refused(capsys, go, "--export", run)
        assert names(run) == before
        return
    transformers = pytest.importorskip("transformers")
    written = go("--export", run)
    said = capsys.readouterr().out
    assert "transformers.AutoModelForSequenceClassification.from_pretrained" in said
    assert ("quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True" in said) == (method == "qlora")
    ours, encode = reopen(read_settings(run), run, summary)
    ids = torch.tensor([encode([("the dog chased the cat .", None, 0)])[0][0]])
    expected = ours.eval()(ids)
    opened = {"merged": transformers.AutoModelForSequenceClassification}
    if METHODS[method].low_rank or method == "propelt-lora":
        opened["peft"] = pytest.importorskip("peft").AutoPeftModelForSequenceClassification
    assert set(written) == set(opened) and names(run) == sorted([*before, *opened])
    for name, loader in opened.items():
        theirs = loader.from_pretrained(written[name]).eval()
        on_its_base = (method, name) != ("qlora", "peft")  # here in full precision
        assert torch.allclose(theirs(ids).logits, expected, atol=1e-5) == on_its_base, name


OTHERS = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]  # of a checkpoint's own head, in another order than ours


@pytest.mark.parametrize("task,head", [
    ("mini-mnli", []), ("mini-stsb", []), ("mini-cola", []), ("mini-mnli", OTHERS), ("mini-rte", OTHERS),
    ("mini-stsb", OTHERS),
])  # fmt: skip
def test_the_lines_that_export_prints_open_what_it_wrote_with_the_names_of_the_task(go, tmp_path, capsys, task, head):
    """Whatever head and names the checkpoint underneath has."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    pytest.importorskip("safetensors")
    weights = tmp_path / "weights"
    encoder = TinyTransformer(TransformerConfig(130, 16, 2, 2, 32, 48, 2))
    save_pretrained(SequenceClassifier(encoder, 3) if head else MaskedLM(encoder), weights, head)
    run = tmp_path / "run"
    summary = go("--task", task, "--weights", weights, "--out", run)
    capsys.readouterr()
    go("--export", run)
    assert (run / "merged" / "model.safetensors").is_file()
    ours, encode = reopen(read_settings(run), run, summary)
    ids = torch.tensor([encode([("the dog chased the cat .", None, 0)])[0][0]])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert [line.partition(".")[0] for line in lines] == ["peft", "transformers"]
    for line in lines:
        theirs = eval(line, {"peft": peft, "transformers": transformers}).eval()
        assert torch.allclose(theirs(ids).logits, ours.eval()(ids), atol=1e-5)
        labels = task_of(task).labels or ("score",)
        assert theirs.config.id2label == dict(enumerate(labels))
        assert theirs.config.label2id == {label: i for i, label in enumerate(labels)}


def test_an_official_task_runs_with_a_bert_checkpoint(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a good bad film . very".split()
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = transformers.BertConfig(vocab_size=len(words), **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.BertForSequenceClassification(config).save_pretrained("bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
    texts = [(f"{'very ' * (i % 3)}{word}", label) for i in range(20) for word, label in (("good", 1), ("bad", 0))]
    rows = ["sentence\tlabel"] + [f"a {text} film .\t{label}" for text, label in texts]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    flags = "--task sst2 --data . --weights bert --lr 0.02 --epochs 12 --device cpu --batch-size 8 --out run"
    summary = main_job(*flags.split(), "--rows", 40)
    assert summary["score"] == 1.0 and summary["density_kept"] <= 0.5
    assert "tensors not used: classifier.bias" in capsys.readouterr().out
    assert main_job("--evaluate", "run", "--data", tmp_path)["score"] == 1.0
