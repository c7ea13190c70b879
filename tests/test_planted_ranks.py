"""Planted ranks: the teacher has them, SaLoRA finds them, and all methods keep to one budget."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from strategies import make_layer

from experiments import planted_ranks
from salora import salora_layers


def test_planted_ranks_are_found(tmp_path):
    """16 maps of 32 x 32 with updates of rank 0 to 8 and noisy outputs: each learned rank is the planted one."""
    flags = ["--steps", "300", "--seeds", "0", "--tasks", "maps-.1", "--arms", "salora-8", "--out", str(tmp_path)]
    [row] = planted_ranks.main(flags)
    assert float(row["right"]) == 1 and row["learned"] == row["planted"], "every matrix gets the rank it deserves"
    assert float(row["share"]) == 1 and float(row["loss"]) < 0.005, "within the budget, and the teacher is matched"
    assert (tmp_path / "planted.png").stat().st_size > 5000


def test_what_salora_is_compared_with_keeps_to_the_same_budget(tmp_path):
    flags = ["--steps", "20", "--seeds", "0", "--tasks", "maps-1", "--out", str(tmp_path)]
    rows = planted_ranks.main([*flags, "--arms", "lora-8-svd", "lora"])
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


def test_planted_updates_have_the_ranks_that_are_said():
    network, inputs = planted_ranks.network_of(0, 4)
    teacher = copy.deepcopy(network)
    ranks = planted_ranks.plant(teacher, torch.Generator().manual_seed(0))
    assert len(ranks) == 16 and not torch.equal(teacher(inputs), network(inputs))
    for rank, layer in zip(ranks, salora_layers(teacher).values(), strict=True):
        values = torch.linalg.svdvals(layer.delta())
        assert int((values > 0.4).sum()) == int((values > 1e-4).sum()) == rank


def test_what_is_learned_is_scored_on_inputs_that_nobody_trained_on(monkeypatch, tmp_path):
    network_of, inputs = planted_ranks.network_of, []

    def noted(seed, rows):
        network, x = network_of(seed, rows)
        inputs.append({tuple(row) for row in x[:, 0].tolist()})
        return network, x

    monkeypatch.setattr(planted_ranks, "network_of", noted)
    flags = ["--steps", "2", "--seeds", "0", "1", "--tasks", "maps-1", "--out", str(tmp_path)]
    planted_ranks.main([*flags, "--arms", "lora"])
    assert [len(some) for some in inputs] == [128, 256, 128, 256] and len(set.union(*inputs)) == 768


def test_a_task_has_the_noise_of_its_name(monkeypatch):
    targets = []

    def fine_tune(network, rows, *_, batch_of, **more):
        targets.append(batch_of(rows, network, "cpu")[1])

    monkeypatch.setattr(planted_ranks, "fine_tune", fine_tune)
    for task in planted_ranks.NOISE:
        planted_ranks.measure(SimpleNamespace(steps=1), task, planted_ranks.arm_of("lora"), 0, ())
    little, much = targets  # the same draws, times .1 and 1
    assert (much - little).std().item() == pytest.approx(0.9, abs=0.02)


def test_arms_of_other_studies_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        planted_ranks.main(["--arms", "salora-16-to-4", "--out", str(tmp_path)])
    assert stopped.value.code == 2 and "is not an arm of this study: salora-8-paper, " in capsys.readouterr().err
