"""Faults that the tests must notice: one small change of one function at a time, and the test that fails for it.

    python tools/faults.py [words]      try all, or those whose lines contain these words; minutes for all

A fault is noticed if its test fails in a copy of the tree with that one function changed. A test that cannot even start
does not count. `python -m pytest -m slow` tries all of them, too, after the tests on the tree as it is.
"""

import ast
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

FAULTS = {  # file: [(function, or "" for what is outside; text that occurs once in it; what replaces it; the test)]
    "train_glue_mini.py": [
        ("", "signal.signal(signal.SIGINT, signal.SIG_DFL)", "signal.getsignal(signal.SIGINT)",
         "test_an_interruption_while_torch_is_imported_prints_nothing"),
        ("task_loss", "outputs.view_as(labels)", "outputs",
         "test_loss_is_cross_entropy_of_classes_and_squared_error_of_scores"),
        ("fine_tune", "    model.train()\n", "", "test_gradients_of_the_main_loop_are_those_of_alg_1"),
        ("fine_tune", "range(allocator.step, allocator", "range(0, allocator",
         "test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit[salora-before]"),
        ("fine_tune", 'seed_of(seed, "batches", epoch)', 'seed_of(seed, "batches")',
         "test_every_epoch_of_every_seed_has_its_own_order_and_dropout"),
        ("fine_tune", 'seed_of(seed, "dropout", epoch, worker())', 'seed_of(seed, "dropout")',
         "test_every_epoch_of_every_seed_has_its_own_order_and_dropout"),
        ("fine_tune", "lr * allocator.lr_factor(step)", "lr",
         "test_main_loop_warms_the_learning_rate_up_anew_and_restarts_it_if_asked"),
        ("fine_tune", "inputs, labels = batch_of(part, model, device)",
         'inputs, labels = batch_of(part, model, device); __import__("budget").resample(allocator.layers)',
         "test_micro_batches_of_a_step_see_one_mask_and_every_step_of_the_window_its_own"),
        ("fine_tune", "(len(part) / len(batch))", "(1 / accumulate)",
         "test_accumulating_equals_the_whole_batch_noise_included"),
        ("fine_tune", "        optimizer.zero_grad()\n", "", "test_gradients_of_the_main_loop_are_those_of_alg_1"),
        ("run", "score = lambda: -loss_of", "score = lambda: loss_of",
         "test_alora_in_the_main_job_scores_by_the_loss_of_rows_held_out_of_training"),
        ("main", "args.evaluate is not None or args.predict is not None", "args.evaluate is not None",
         "test_bad_input_is_one_clear_line_and_leaves_nothing_behind[--predict test.tsv]"),
        ("main", "redirect_stdout(None) if worker() > 0 else", "nullcontext() if worker() > 0 else",
         "test_two_processes_train_like_one_and_only_the_first_speaks"),
    ],
    "cli/afterwards.py": [
        ("predict", "torch.tensor(order).argsort()", "torch.tensor(order)",
         "test_predictions_come_in_the_order_of_the_rows"),
        ("predict", "    model.eval()\n", "", "test_predictions_come_in_the_order_of_the_rows"),
        ("reopen", 'frozen_digest(model) != summary.get("frozen_digest")', "False",
         "test_other_weights_in_the_encoders_folder_and_another_adapter_are_noticed"),
        ("reopen", 'digest_of(adapter_state(model)) != summary.get("adapter_digest")', "False",
         "test_other_weights_in_the_encoders_folder_and_another_adapter_are_noticed"),
    ],
    "cli/files.py": [
        ("make_folder", "(FileExistsError, NotADirectoryError)", "FileExistsError",
         "test_a_file_in_the_place_of_a_folder_is_refused_before_anything_long"),
        ("check_free", "found and not {", "False and not {",
         "test_default_folders_are_numbered_on_and_a_given_one_is_never_overwritten"),
        ("check_free", 'if path.name != "checkpoint.pt.part"', "if True",
         "test_a_folder_is_free_if_it_holds_nothing_but_what_an_early_end_leaves"),
        ("claimed", "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
         "test_a_folder_is_one_runs_alone_until_that_ends"),
        ("claimed", '(folder / "checkpoint.pt").unlink(missing_ok=True)', "pass",
         "test_a_run_that_diverges_leaves_no_checkpoint"),
        ("claimed", '        if not (folder / "checkpoint.pt").is_file():\n            raise\n', "",
         "test_an_interruption_says_how_to_go_on"),
        ("_feed", 'f"{value.dtype} {tuple(value.shape)}"', 'f"{value.dtype}"', "test_equal_digests_mean_equal_content"),
        ("_feed", " or 0 in value.stride()", "", "test_damaged_and_foreign_files_are_refused_and_left_alone"),
    ],
    "cli/flags.py": [
        ("positive", "if float(text) >= LARGEST:", "if False:",
         "test_bad_input_is_one_clear_line_and_leaves_nothing_behind"),
        ("share", "if value >= 1:", "if value > 1:", "test_bad_input_is_one_clear_line_and_leaves_nothing_behind"),
        ("device_of", 'name.startswith("cuda") and', "False and",
         "test_under_torchrun_a_process_takes_the_cuda_device_of_its_own_rank"),
    ],
    "cli/journal.py": [
        ("trace_of", "layer.B.T @ layer.B - I", "layer.A @ layer.A.T - I",
         "test_a_trace_has_every_matrix_at_every_logged_step_and_changes_no_number"),
        ("trace_of", "layer.gate.open_probability().sum()", "layer.gate.settled().sum()",
         "test_a_trace_has_every_matrix_at_every_logged_step_and_changes_no_number"),
        ("Journal.begin_epoch", "if not all(p.isfinite().all()", "if not all(True",
         "test_weights_that_are_not_finite_never_replace_a_checkpoint"),
        ("Journal.begin_epoch", '"rows": self.rows', '"rows": []',
         "test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit[lora-after]"),
        ("Journal.restore", 'if saved["fingerprint"].get(name) != value:', "if False:",
         "test_settings_that_were_edited_are_not_resumed"),
        ("Journal.restore", '        self.trace = state["trace"]\n', "",
         "test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit[salora-before]"),
        ("Journal.add", "(self.running / self.counted).item()", "self.running.item()",
         "test_a_log_row_is_the_mean_loss_of_the_steps_since_the_last_one"),
        ("Journal.add", "not math.isfinite(mean)", "False",
         "test_a_run_that_diverges_ends_with_the_step_and_what_to_do"),
    ],
    "cli/pictures.py": [
        ("rank_grid", "split_name(name)[::-1]", "split_name(name)",
         "test_the_table_of_ranks_has_a_line_per_block_and_a_column_per_matrix"),
    ],
    "cli/report.py": [
        ("finish_run", '(folder / "checkpoint.pt").unlink(missing_ok=True)', "pass",
         "test_every_task_runs_within_its_budget_and_ends_up_in_a_table"),
        ("write_predictions", "min(5.0, max(0.0, p))", "p",
         "test_predictions_use_the_names_of_labels_and_of_both_test_sets"),
    ],
    "cli/runs.py": [
        ("errors_as_lines", "FloatingPointError, ", "", "test_a_run_that_diverges_ends_with_the_step_and_what_to_do"),
        ("errors_as_lines", "torch.linalg.LinAlgError, ", "", "test_an_svd_that_does_not_converge_and_memory_that_is_too_small_are_one_line"),
        ("interrupted", 'saved.pop("digest", None) == digest_of(saved)', 'saved.pop("digest", None) is not None',
         "test_damaged_and_foreign_files_are_refused_and_left_alone"),
        ("read_run", "more = [k for k", "more = [] and [k for k",
         "test_bad_input_is_one_clear_line_and_leaves_nothing_behind"),
        ("read_finished", 'not (folder / "summary.json").is_file()', "False",
         "test_a_run_that_is_not_finished_is_neither_evaluated_nor_exported"),
    ],
    "cli/settings.py": [
        ("settle", "str(Path(weights).resolve())", "str(weights)",
         "test_a_finished_run_scores_the_same_again_from_any_folder_and_stays_as_it_is"),
        ("settle", "if getattr(args, name) is None:", "if True:", "test_settings_follow_from_task_method_and_recipe"),
        ("check_flags", "if given and not there:", "if False:",
         "test_bad_input_is_one_clear_line_and_leaves_nothing_behind"),
        ("dropout_rates", 'args.method not in ("full", "head")', "True",
         "test_settings_follow_from_task_method_and_recipe"),
        ("read_settings", 'if used(settings) != {**found, "device": "cpu"}:', "if False:",
         "test_settings_that_the_program_would_not_have_written_are_refused"),
        ("read_settings", 'device or str(found.get("device"))', 'str(found.get("device"))',
         "test_a_finished_run_scores_the_same_again_from_any_folder_and_stays_as_it_is"),
    ],
    "cli/setup.py": [
        ("seed_of", "getrandbits(63)", "getrandbits(1)",
         "test_every_epoch_of_every_seed_has_its_own_order_and_dropout"),
        ("build", "use_deterministic_algorithms(bool(settings.deterministic))", "use_deterministic_algorithms(False)",
         "test_deterministic_algorithms_are_used_where_they_are_asked_for"),
    ],
    "cli/workers.py": [
        ("start_workers", "        import torch._dynamo", "        pass",
         "test_two_processes_train_like_one_and_only_the_first_speaks"),
        ("share_of", "batch[worker() + workers() * i :: stride]", "batch[worker() :: stride]",
         "test_accumulating_equals_the_whole_batch_noise_included"),
        ("add_up", "dist.all_reduce(flat)", "pass", "test_two_processes_train_like_one_and_only_the_first_speaks"),
        ("add_up", "p.grad = grad.view_as(p)", "pass", "test_two_processes_train_like_one_and_only_the_first_speaks"),
    ],
    "glue/metrics.py": [
        ("f1", "float(2 * hits / both)", "float(hits / both)", "test_metrics_by_hand"),
        ("pearson", "np.ptp(predicted) == 0 or np.ptp(gold) == 0", "not x.any() or not y.any()",
         "test_a_constant_whose_mean_is_rounded_has_no_correlation"),
        ("spearman", "(counts - 1) / 2", "0", "test_metrics_by_hand"),
    ],
    "glue/mini.py": [
        ("change", " if concept not in taken]", "]", "test_labels_of_pairs_follow_from_the_words_alone"),
        ("cola", '"this" if is_plural else "these"', '"these" if is_plural else "this"',
         "test_grammar_faults_are_really_faults"),
        ("sst2", "praise != turned", "praise == turned", "test_sentiment_follows_from_the_clause_that_decides"),
    ],
    "glue/pretrain.py": [
        ("trained_once", "shutil.rmtree(part, ignore_errors=True)", "pass",
         "test_of_two_runs_that_pre_train_at_once_the_first_to_finish_leaves_its_encoder"),
        ("corrupt", "(chance < rate) & (ids > tokenizer.mask)", "(chance < rate)",
         "test_corruption_hides_words_only_and_of_a_pair_one_side_only"),
    ],
    "glue/tasks.py": [
        ("read_rows", "utf-8-sig", "utf-8",
         "test_official_layouts_are_read_with_any_line_end_and_byte_order_mark"),
        ("read_rows", '.split("\\n")\n', ".splitlines()\n",
         "test_quotes_and_odd_line_separators_are_part_of_a_sentence"),
    ],
    "glue/tokens.py": [
        ("MiniTokenizer.encode_pair", "(a if len(a) > len(b) else b).pop()", "(b or a).pop()",
         "test_truncation_takes_from_the_longer_sentence"),
        ("collate", "ids + [pad] * (longest", "ids + [0] * (longest", "test_collate_pads_to_the_longest_row"),
        ("batches_of", "random.Random(seed).sample", "random.Random(0).sample",
         "test_batches_hold_every_row_once_in_an_order_that_the_seed_decides"),
    ],
}  # fmt: skip


def all_faults():
    """The table as a list of (file, function, old, new, test)."""
    return [(file, *row) for file, rows in FAULTS.items() for row in rows]


def lines_of(source, function):
    """The first line of a function or class, its decorators included, and the line after its last, counted from 0. Of
    two with one name the first; everything for "". Raises ValueError where there is none."""
    node = ast.parse(source)
    if not function:
        return 0, len(source.splitlines())
    for name in function.split("."):
        inner = [child for child in ast.walk(node) if child is not node and getattr(child, "name", None) == name]
        if not inner:
            raise ValueError(f"no function {function}")
        node = inner[0]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return first - 1, node.end_lineno


def broken(file, function, old, new):
    """The text of a file with a fault in it. Raises ValueError for a row of the table that has lost its place."""
    source = (ROOT / file).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    try:
        first, end = lines_of(source, function)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    text = "".join(lines[first:end])
    if text.count(old) != 1 or old == new:
        where = f"{file}, {function or 'as a whole'},"
        raise ValueError(f"{where} holds {old!r} {text.count(old)} times, but should once, and {new!r} must be another")
    changed = "".join(lines[:first]) + text.replace(old, new) + "".join(lines[end:])
    try:
        compile(changed, file, "exec")
    except SyntaxError as error:
        raise ValueError(f"{file}, {function}: {new!r} in the place of {old!r} is no program: {error}") from None
    return changed


def test_id(test):
    """tests/FILE.py::test for the name of a test, or FILE.py::test where two files have one of that name."""
    name = test.split("::")[-1].split("[")[0]
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py"))
             if re.search(rf"^ *def {name}\(", path.read_text(encoding="utf-8"), re.M)]  # fmt: skip
    files = [path for path in files if "::" not in test or path.name == test.split("::")[0]]
    if len(files) != 1:
        raise ValueError(f"{len(files)} files have a test {test}")
    return f"tests/{files[0].name}::{test.split('::')[-1]}"


def check(rows):
    """Raises ValueError for all rows that have lost their place or their test."""
    problems = []
    for *fault, test in rows:
        for find in (lambda: broken(*fault), lambda: test_id(test)):
            try:
                find()
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def run_tests(tests, change=None):
    """Run tests in a copy of the tree, in this process. change: (file, its new text). Returns pytest's status and what
    it said."""
    torch.set_num_threads(1)
    os.environ.pop("SALORA_IMPL", None)
    flags = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:randomly", "--hypothesis-profile=mutants"]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()) as said, redirect_stderr(said):
        copy = Path(folder).resolve() / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "*venv*"))
        if change:
            (copy / change[0]).write_text(change[1], encoding="utf-8")
        os.chdir(copy)
        status = pytest.main([*flags, f"--rootdir={copy}", *tests])
        os.chdir(ROOT)
    return int(status), said.getvalue()


def attempt(row):
    """(whether the fault was noticed, what pytest said)."""
    file, function, old, new, test = row
    status, said = run_tests([test_id(test)], (file, broken(file, function, old, new)))
    return status == 1, said  # 1: tests ran, and some failed


def tests_pass(tests):
    """(whether these tests pass on the tree as it is, what pytest said)."""
    status, said = run_tests(tests)
    return status == 0, said


def in_processes(function, items):
    """Yields function(item) in order, each from a process of its own; what takes long to import is there already."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "hypothesis", "pytest", "matplotlib.figure"])
    with context.Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        results = pool.imap(function, items)
        for _ in items:
            yield results.next(timeout=900)


def attempt_all(rows):
    """Try all faults, and print a line for each. Returns the lines of those that no test noticed."""
    survivors = []
    for row, (noticed, said) in zip(rows, in_processes(attempt, rows)):
        file, function, old, new, test = (" ".join(text.split()) for text in row)
        line = f"{file}, {function or 'outside of functions'}: {old}  ->  {new or 'nothing'}  ({test})"
        print(("noticed  " if noticed else "SURVIVED ") + line + ("" if noticed else "\n" + said), flush=True)
        survivors += [] if noticed else [line]
    return survivors


def main(words):
    started, rows = time.time(), [row for row in all_faults() if words in " ".join(row)]
    check(rows)
    survivors = attempt_all(rows)
    print(f"{len(rows) - len(survivors)} of {len(rows)} faults noticed in {time.time() - started:.0f} s")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
