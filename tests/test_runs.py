"""Nothing lost, nothing let in: run folders that were interrupted, damaged, shared, edited or cannot be written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_program import FILES, adapter_of, go, log_of, quick_pictures, refused  # noqa: F401  (fixtures)

import train_glue_mini
from cli import journal
from cli.files import check_free, claimed, digest_of
from cli.flags import TRIPLET_METHODS
from cli.runs import read_settings
from glue import pretrain
from peers import PEERS
from salora import salora_layers


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def stop_after(monkeypatch, steps, error=KeyboardInterrupt):
    """The next run ends with this error in its step `steps` + 1."""
    task_loss, calls = train_glue_mini.task_loss, []

    def loss(outputs, labels):
        calls.append(1)
        if len(calls) > steps:
            raise error
        return task_loss(outputs, labels)

    monkeypatch.setattr(train_glue_mini, "task_loss", loss)


def interrupt(go, monkeypatch, out, *flags, steps=14):  # noqa: F811
    with monkeypatch.context() as now, pytest.raises(SystemExit):
        stop_after(now, steps)
        go("--out", out, *flags)


# Runs that ended early


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew_with_the_same_command(go, tmp_path, monkeypatch):  # noqa: F811
    interrupt(go, monkeypatch, tmp_path / "run", steps=2)
    assert names(tmp_path / "run") == ["settings.json"]
    again, straight = go("--out", tmp_path / "run"), go("--out", tmp_path / "other")
    assert again["adapter_digest"] == straight["adapter_digest"] and names(tmp_path / "run") == FILES


def test_a_folder_is_free_if_it_holds_nothing_but_what_an_early_end_leaves(tmp_path):
    check_free(tmp_path / "new")
    for found, free in (
        ([], True),
        (["settings.json"], True),
        (["settings.json.part"], True),
        (["settings.json", "checkpoint.pt.part"], True),
        (["settings.json", "adapter.pt", "log.csv", "training.png.part"], True),
        (["settings.json", "checkpoint.pt"], False),
        (["settings.json", "summary.json"], False),
        (["settings.json", "notes.txt"], False),
        (["adapter.pt"], False),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in found:
            (folder / name).touch()
        if free:
            check_free(folder)
        else:
            with pytest.raises(FileExistsError, match="choose another --out"):
                check_free(folder)


def test_a_run_with_a_checkpoint_is_not_begun_anew_by_mistake(go, tmp_path, monkeypatch, capsys):  # noqa: F811
    interrupt(go, monkeypatch, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert "holds an interrupted run: --resume it, or" in refused(capsys, go, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_run_that_diverges_leaves_no_checkpoint_and_starts_anew(go, tmp_path, capsys, monkeypatch):  # noqa: F811
    with monkeypatch.context() as now:
        stop_after(now, 14, FloatingPointError("the loss is nan"))
        assert "the loss is nan" in refused(capsys, go, "--out", tmp_path / "run")
    assert names(tmp_path / "run") == ["settings.json"]
    go("--out", tmp_path / "run")


def test_weights_that_are_not_finite_never_replace_a_checkpoint(go, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Between two looks at the loss a checkpoint falls due."""
    written, save = [], torch.save

    def spoil(model, step):
        if step == 12:
            next(iter(salora_layers(model).values())).A.data[0, 0] = float("nan")

    begin = journal.Journal.begin_epoch

    def begin_epoch(self, step, model, *rest):
        spoil(model, step)
        begin(self, step, model, *rest)

    monkeypatch.setattr(journal.Journal, "begin_epoch", begin_epoch)
    monkeypatch.setattr(torch, "save", lambda state, path: (written.append(state), save(state, path)))
    assert "weights are not finite at step 12" in refused(capsys, go, "--out", tmp_path / "run")
    assert [state["journal"]["step"] for state in written] == [6]


# Resume


@pytest.mark.parametrize("key, value", [("steps", 10), ("batch_size", 4), ("rows", 40), ("lr", 1e-3), ("density", 0.4)])
def test_settings_that_were_edited_are_not_resumed(go, tmp_path, monkeypatch, capsys, key, value):  # noqa: F811
    interrupt(go, monkeypatch, tmp_path / "run")
    path = tmp_path / "run" / "settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, key: value}))
    message = refused(capsys, go, "--resume", path.parent)
    assert f"the interrupted run had {key} {settings[key]}, but now it is {value}" in message
    path.write_text(json.dumps(settings))
    assert go("--resume", path.parent)["steps"] == 20, "and the checkpoint is still there"


@pytest.mark.parametrize("part", ["adapter", "optimizer", "allocator", "journal", "plan"])
def test_a_checkpoint_of_other_content_is_not_resumed(go, tmp_path, monkeypatch, capsys, part):  # noqa: F811
    interrupt(go, monkeypatch, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved[part] = {**saved[part], "more": 1}
    torch.save(saved, path)
    message = refused(capsys, go, "--resume", path.parent)
    assert "checkpoint.pt is damaged: what it holds is not what was saved" in message


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_other_weights_in_the_encoders_folder_are_noticed(go, tmp_path, monkeypatch, capsys, tiny_weights, flag):  # noqa: F811
    weights = Path(shutil.copytree(tiny_weights, tmp_path / "weights"))
    if flag == "--resume":
        interrupt(go, monkeypatch, tmp_path / "run", "--weights", weights)
    else:
        go("--out", tmp_path / "run", "--weights", weights)
    tensors = torch.load(weights / "pytorch_model.bin", weights_only=True)
    next(iter(tensors.values())).add_(1)
    torch.save(tensors, weights / "pytorch_model.bin")
    message = refused(capsys, go, flag, tmp_path / "run")
    assert "frozen weights" in message or "holds other weights than those" in message


def test_another_adapter_in_a_run_is_noticed(go, tmp_path, capsys):  # noqa: F811
    go("--out", tmp_path / "a")
    go("--out", tmp_path / "b", "--seed", 1)
    (tmp_path / "a" / "adapter.pt").write_bytes((tmp_path / "b" / "adapter.pt").read_bytes())
    assert "adapter.pt is not the adapter that the run left there" in refused(capsys, go, "--evaluate", tmp_path / "a")


@pytest.mark.parametrize("change", [{"density": 2}, {"rank": "8"}, {"rank": None}, {"window": [0.2]}, {"window": 3},
                                    {"method": "full"}, {"task": ["mini-cola"]}, {"canonical": 1}, {"lr": "fast"},
                                    {"more": 1}, {"seed": 1.5}, {"dropout": [2, 2]}])  # fmt: skip
def test_settings_that_the_program_would_not_have_written_are_refused(go, tmp_path, change):  # noqa: F811
    go("--out", tmp_path / "run")
    path = tmp_path / "run" / "settings.json"
    before = json.loads(path.read_text())
    assert vars(read_settings(path.parent))["density"] == 0.5
    path.write_text(json.dumps({**before, **change}))
    with pytest.raises(ValueError, match="settings.json is damaged, or of another version"):
        read_settings(path.parent)


# Folders and files


def test_a_folder_is_one_processs_alone_until_that_ends(go, tmp_path, capsys):  # noqa: F811
    code = f"""
import sys
sys.path.insert(0, {str(Path(train_glue_mini.__file__).parent)!r})
from pathlib import Path
from cli.files import claimed
with claimed(Path({str(tmp_path / "run")!r}), new=True):
    print("mine", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "mine\n"
    assert "another run is at work in" in refused(capsys, go, "--out", tmp_path / "run")
    other.kill()
    other.wait()
    assert go("--out", tmp_path / "run")["steps"] == 20


def test_a_claimed_folder_into_which_nothing_came_is_gone_again(tmp_path):
    with pytest.raises(ValueError), claimed(tmp_path / "a" / "b", new=True):
        raise ValueError
    assert names(tmp_path) == []


@pytest.mark.parametrize("kilobytes", [0, 4, 20])
def test_a_full_disk_ends_the_run_with_one_line_and_no_half_file(tmp_path, tiny_weights, kilobytes):
    """A limit on the size of files stands for the disk: the settings, the adapter or a picture does not fit."""
    flags = ["--weights", tiny_weights, "--rows", 48, "--batch-size", 8, "--steps", 20, "--device", "cpu"]
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train_glue_mini
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes * 1024}, {kilobytes * 1024}))
train_glue_mini.main({[str(flag) for flag in [*flags, "--out", tmp_path / "run"]]!r})
"""
    environment = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be written: " in done.stderr, done.stderr
    assert not list(tmp_path.rglob("*.part"))


def test_closed_standard_output_is_one_line(tmp_path, tiny_weights):
    flags = ["--weights", tiny_weights, "--rows", "48", "--steps", "200", "--out", tmp_path / "run", "--device", "cpu"]
    program = subprocess.Popen([sys.executable, train_glue_mini.__file__, *map(str, flags)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    program.stdout.close()
    error = program.stderr.read()
    assert program.wait() == 2 and error == "train_glue_mini.py: error: standard output was closed\n"


def test_an_unwritable_place_is_refused_before_anything_long(go, tmp_path, capsys, monkeypatch):  # noqa: F811
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train_glue_mini, "prepare", lambda *_: pytest.fail("it should not have come so far"))
    assert "Not a directory" in refused(capsys, go, "--out", tmp_path / "file" / "run")


def test_a_place_where_the_tiny_encoder_cannot_be_kept_is_refused_before_it_is_trained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pretrain, "pretrain", lambda *_: pytest.fail("it should not have come so far"))
    with pytest.raises(OSError):
        pretrain.mini_encoder(tmp_path / "file")


def test_pretraining_that_is_interrupted_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(device):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "pretrain", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.mini_encoder(tmp_path / "runs")
    assert names(tmp_path / "runs") == []


def test_equal_digests_mean_equal_content():
    values = [torch.ones(2), torch.ones(2, 1), torch.ones(2).double(), torch.ones(())]
    values += [[1.0, 1.0], (1.0, 1.0), [[1.0], 1.0], "1", 1, {"a": 1}, {"b": 1}]
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of({"a": torch.ones(2).bfloat16()}) == digest_of({"a": torch.ones(4)[::2].bfloat16()})


# What a run says of itself


def test_a_summary_says_what_was_run_with_what(go, tmp_path):  # noqa: F811
    summary = go("--out", tmp_path / "run", "--recipe", "paper")
    assert summary["recipe"] == "paper" and summary["command"].startswith("train_glue_mini.py --out ")
    assert set(summary["versions"]) == {"python", "torch", "numpy"}
    assert summary["versions"]["torch"] == torch.__version__
    assert "recipe" not in go("--method", "lora")


@pytest.mark.parametrize("flags", [["--recipe", "paper"], [], ["--method", "lora"], ["--method", "full"]])
def test_settings_hold_the_values_that_were_used_and_none_is_null(go, tmp_path, flags):  # noqa: F811
    go("--out", tmp_path / "run", *flags)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert None not in settings.values() and settings["dropout"] in ([0.0, 0.0], [0.1, 0.1])
    assert ("gate_lr" in settings) == ("recipe" in settings) == (flags in ([], ["--recipe", "paper"]))
    if "recipe" in settings:
        assert settings["gate_lr"] == pytest.approx(14 / (2 if settings["recipe"] == "ours" else 6)), "and not auto"


def test_deterministic_algorithms_are_used_where_they_are_asked_for(go):  # noqa: F811
    for flags, expected in ((["--deterministic"], True), ([], False)):
        go(*flags)
        assert torch.are_deterministic_algorithms_enabled() == expected


# Export


@pytest.mark.parametrize(
    "method", ["salora", "lora", "full", *(name for name, peer in PEERS.items() if not peer.adds_modules)]
)
def test_an_exported_run_opens_elsewhere_with_the_same_outputs(go, tmp_path, method, capsys):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    from cli.afterwards import reopen

    summary = go("--out", tmp_path / "run", "--method", method)
    written = go("--export", tmp_path / "run")
    out = capsys.readouterr().out
    assert "transformers.AutoModelForSequenceClassification.from_pretrained" in out
    ours, encode = reopen(read_settings(tmp_path / "run"), tmp_path / "run", summary)
    ids = torch.tensor([encode([("the dog chased the cat .", None, 0)])[0][0]])
    expected = ours.eval()(ids)
    opened = {"merged": transformers.AutoModelForSequenceClassification}
    if method in TRIPLET_METHODS:
        opened["peft"] = pytest.importorskip("peft").AutoPeftModelForSequenceClassification
    assert set(written) == set(opened)
    for name, loader in opened.items():
        theirs = loader.from_pretrained(written[name]).eval()
        assert torch.allclose(theirs(ids).logits, expected, atol=1e-5), name
    assert {"peft", "merged"} & set(names(tmp_path / "run")) == set(opened)


@pytest.mark.parametrize("method", [name for name, peer in PEERS.items() if peer.adds_modules])
def test_a_run_that_adds_modules_says_at_once_that_it_cannot_be_exported(go, tmp_path, capsys, method):  # noqa: F811
    go("--method", method, "--steps", 2, "--out", tmp_path / "run")
    said = f"{method} adds modules to the encoder: the run can be evaluated, but not merged or exported"
    assert said in capsys.readouterr().out
    before = names(tmp_path / "run")
    message = refused(capsys, go, "--export", tmp_path / "run")
    assert f"--method {method} adds modules to the encoder, which no checkpoint has room for" in message
    assert names(tmp_path / "run") == before


def test_a_run_that_is_not_finished_is_not_exported(go, tmp_path, monkeypatch, capsys):  # noqa: F811
    interrupt(go, monkeypatch, tmp_path / "run")
    assert "is not finished: go on with --resume" in refused(capsys, go, "--export", tmp_path / "run")
