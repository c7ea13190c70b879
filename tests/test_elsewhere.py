"""Loops, bases and processes of others: what trains there finds the ranks that a plain loop finds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from loops import Run
from strategies import assert_close, row

from budget import kept_density
from hub.adapters import load_adapter, save_adapter
from hub.peft import export_peft
from rank_allocator import RankAllocator, Recipe
from salora import adapt, disabled, merge, salora_layers

KINDS = ["plain", "ddp", "ddp-loaded", "loaded-ddp", "accelerate", "fsdp2", "trainer", "lightning"]


def assert_alike(found, expected):
    """The same ranks, and the same updates to rounding."""
    assert {name: rank for name, (rank, _) in found.items()} == {name: rank for name, (rank, _) in expected.items()}
    for name, (_, delta) in found.items():
        gap = (torch.tensor(delta) - torch.tensor(expected[name][1])).abs().max().item()
        assert gap <= 1e-4, f"{name}: {gap}"


@pytest.mark.equation("alg 1")
def test_two_processes_of_every_kind_find_what_one_finds(tmp_path):
    for package in ("transformers", "accelerate", "lightning"):
        pytest.importorskip(package)
    out = tmp_path / "found.json"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", processes.__file__, out, *KINDS]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(Path(out).read_text())
    merging, sharded_adapters = found["fsdp2"].pop("refused")
    assert "is sharded: load the saved adapter into a whole model" in merging and "ignored_params" in sharded_adapters
    for kind in KINDS:
        with row(kind):
            assert_alike(found[kind], processes.run(kind, tmp_path / kind))
    assert 0 in [rank for rank, _ in found["plain"].values()], "a matrix that has lost all its triplets is among them"


# Trainers


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_trainer_gives_a_llama_its_budget_and_resumes_from_small_checkpoints_equal_to_the_bit(tmp_path):
    """In the window and after T_end, with dropout, at a budget at which some layers lose all their triplets."""
    pytest.importorskip("accelerate")
    trainer = processes.trainer(tmp_path, 0.1, 0.1)
    trainer.train()
    expected, layers = states(trainer.model), salora_layers(trainer.model).values()
    assert min(layer.r for layer in layers) == 0 and kept_density(layers) <= 0.1
    for stop in (7, 14):
        folder = tmp_path / f"checkpoint-{stop}"
        saved = torch.load(folder / "trained.pt")
        assert not [name for name in saved if ".base." in name or "embed" in name], "no frozen weight"
        resumed = processes.trainer(tmp_path, 0.1, 0.1, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(folder))
        assert_equal(states(resumed.model), expected)
        elsewhere = tmp_path / "elsewhere"  # where a checkpoint of the same name is another run's
        shutil.copytree(tmp_path / "checkpoint-7", elsewhere / f"checkpoint-{stop}", dirs_exist_ok=True)
        (elsewhere / f"checkpoint-{stop}" / "allocator.pt").write_bytes(b"another")
        resumed = processes.trainer(elsewhere, 0.1, 0.1, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(folder))
        assert_equal(states(resumed.model), expected)
    with pytest.raises(ValueError, match="checkpoint-20 has all 20 steps: nothing is left to train"):
        processes.trainer(tmp_path, 0.1, 0.1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=7)
    with pytest.raises(ValueError, match="load_best_model_at_end could bring back weights"):
        processes.trainer(tmp_path, **best).train()


def test_trainer_may_stop_early_after_t_end_and_not_before(tmp_path):
    hf = pytest.importorskip("transformers")

    class Stop(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == self.at

    for at in (12, 5):
        trainer = processes.trainer(tmp_path)
        stop = Stop()
        stop.at = at
        trainer.add_callback(stop)
        if at == 12:
            trainer.train()
            save_adapter(trainer.model, tmp_path / "adapter.pt")
        else:
            with pytest.raises(RuntimeError, match="ranks are decided after 10"):
                trainer.train()


def test_accelerate_resumes_from_its_checkpoints_equal_to_the_bit(tmp_path):
    """Also where a layer has lost all its triplets: safetensors would leave its empty tensors out."""
    accelerate = pytest.importorskip("accelerate")

    def prepared():
        run, accelerator = Run(budget=0.1), accelerate.Accelerator(cpu=True)
        run.model, run.optimizer = accelerator.prepare(run.model, run.optimizer)
        accelerator.register_for_checkpointing(run.allocator, run.scheduler)
        return run, accelerator

    for stop in (7, 14):
        run, accelerator = prepared()
        run.train(stop=stop)
        accelerator.save_state(tmp_path / f"{stop}", safe_serialization=False)
        expected = states(run.train(stop).model)
        resumed, accelerator = prepared()
        accelerator.load_state(tmp_path / f"{stop}")
        assert_equal(states(resumed.train(stop).model), expected)
    assert min(layer.r for layer in run.layers) == 0


def test_lightning_resumes_from_its_checkpoints_equal_to_the_bit(tmp_path):
    """With the same rows in every step: which ones come first after resuming is Lightning's affair."""
    pl = pytest.importorskip("lightning.pytorch")
    trainer, module, data = processes.lightning(tmp_path, 1, 1)
    trainer.callbacks.append(pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1))
    trainer.fit(module, data)
    expected = states(module)
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    for stop in (7, 14):
        trainer, module, data = processes.lightning(tmp_path, 1, 1)
        trainer.fit(module, data, ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=False)
        assert_equal(states(module), expected)
    trainer, module, data = processes.lightning(tmp_path, 1, 1)
    saved = torch.load(tmp_path / "step=14.ckpt", weights_only=False)
    module.load_state_dict(saved["state_dict"])
    allocator = trainer.callbacks[0].allocator
    allocator.load_state_dict(saved["callbacks"]["RankCallback"])
    allocator.finish()
    assert not salora_layers(merge(module))


def test_a_schedule_that_lightning_steps_once_per_epoch_is_refused(tmp_path):
    pytest.importorskip("lightning")
    trainer, module, data = processes.lightning(tmp_path)
    optimizer, [schedule] = module.configure_optimizers()["optimizer"], [module.configure_optimizers()["lr_scheduler"]]
    module.configure_optimizers = lambda: ([optimizer], [schedule["scheduler"]])
    with pytest.raises(ValueError, match='give it "interval": "step"'):
        trainer.fit(module, data)


# Models of others

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
IDS = torch.randint(4, 32, (3, 7), generator=torch.Generator().manual_seed(0))


def build(kind):
    """(a model with random weights, its inputs, targets)."""
    torch.manual_seed(0)
    hf = pytest.importorskip("transformers")
    text, classes = {"input_ids": IDS, "labels": IDS}, {"labels": torch.tensor([0, 1, 1])}
    ends = dict(vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **ends)), text, ["q_proj", "v_proj", "down_proj"]
    if kind == "bert":
        config = hf.BertConfig(**SMALL, vocab_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return hf.BertForSequenceClassification(config), {"input_ids": IDS, **classes}, ["query", "value"]
    if kind == "vit":
        config = hf.ViTConfig(**SMALL, image_size=8, patch_size=4)
        pixels = torch.randn(3, 3, 8, 8)
        return hf.ViTForImageClassification(config), {"pixel_values": pixels, **classes}, "all-linear"
    if kind == "t5":  # whose code reads wo.weight.dtype
        config = hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32, dropout_rate=0.0,
                             decoder_start_token_id=0)  # fmt: skip
        return hf.T5ForConditionalGeneration(config), text, {"q": 4, "v": 4, "wo": 2}
    if kind == "whisper":
        half = dict(layers=1, attention_heads=2, ffn_dim=24)
        sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in half.items()}
        config = hf.WhisperConfig(**sides, **ends, d_model=16, num_mel_bins=4, max_source_positions=8, dropout=0.0,
                                  decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[])  # fmt: skip
        sound = {"input_features": torch.randn(3, 4, 16), "labels": IDS}
        return hf.WhisperForConditionalGeneration(config), sound, ["q_proj", "v_proj", "fc1"]
    config = hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
                           attn_pdrop=0.0, **ends)  # fmt: skip
    return hf.GPT2LMHeadModel(config), text, ["c_attn", "c_fc"]


def train(model, inputs, steps=60, budget=0.4):
    """A loop of the plainest kind. Returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    allocator = RankAllocator(model, optimizer, steps, budget, Recipe.ours(window=(0.3, 0.6)))
    losses = []
    for step in range(steps):
        allocator.before_step(step)
        loss = model(**inputs).loss
        loss.backward()
        allocator.after_backward()
        optimizer.step()
        allocator.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
    allocator.finish()
    return losses


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


@pytest.mark.equation("alg 1", "prune", "merge")
@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "t5", "whisper", "gpt2"])
def test_models_of_others_train_prune_merge_reload_and_open_in_peft(tmp_path, kind):
    peft = pytest.importorskip("peft")

    def fresh():
        model = build(kind)[0]
        if kind == "gpt2":
            before = logits(model, inputs)
            from hub.conv1d import to_linear

            names = to_linear(model)
            assert torch.equal(logits(model, inputs), before) and names
            return model, names
        return model, []

    _, inputs, targets = build(kind)
    model, names = fresh()
    frozen = logits(model, inputs)
    adapt(model, targets, r=4)
    with_head = kind in ("bert", "vit")
    if with_head:
        model.classifier.requires_grad_(True)
    losses = train(model.train(), inputs)
    assert losses[-1] < losses[0] and kept_density(salora_layers(model)) <= 0.4
    tuned = logits(model, inputs)
    if not with_head:
        with disabled(model):
            with disabled(model):
                assert torch.equal(logits(model, inputs), frozen)
            assert torch.equal(logits(model, inputs), frozen)
    save_adapter(model, tmp_path / "adapter.pt")
    assert torch.equal(logits(load_adapter(fresh()[0], tmp_path / "adapter.pt"), inputs), tuned)
    export_peft(model, tmp_path / "peft")
    opened = peft.PeftModel.from_pretrained(build(kind)[0], tmp_path / "peft")
    assert_close(logits(opened, inputs), tuned, 64)
    merged = merge(model)
    if names:
        from hub.conv1d import to_conv1d

        to_conv1d(merged, names)
    assert_close(logits(merged, inputs), tuned, 64)
    assert [type(m) for m in merged.modules()] == [type(m) for m in build(kind)[0].modules()]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_base_gets_float_adapters_which_train_reload_and_open_in_peft(tmp_path, bits, dtype):
    hf, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from hub.trainer import AdapterTrainer

    config = hf.LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 64}, vocab_size=32)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def fresh():
        config = hf.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
        return hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=dtype)

    inputs = {"input_ids": IDS, "labels": IDS}
    model = adapt(fresh(), ["q_proj", "v_proj", "down_proj"], r=4)
    layers = salora_layers(model).values()
    assert {layer.A.dtype for layer in layers} == {torch.float32}, "whatever the base computes in"
    losses = train(model.train(), inputs, budget=0.5)
    assert losses[-1] < losses[0] and kept_density(layers) <= 0.5
    tuned = logits(model, inputs)
    save_adapter(model, tmp_path / "adapter.pt")
    assert torch.equal(logits(load_adapter(fresh(), tmp_path / "adapter.pt"), inputs), tuned)
    trainer = AdapterTrainer(model, hf.TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    trainer.save_model(tmp_path)
    saved = torch.load(tmp_path / "trained.pt")
    assert saved and {name.rsplit(".", 1)[-1] for name in saved} <= {"A", "B", "log_theta", "fixed"}
    export_peft(model, tmp_path / "peft")
    opened = peft.PeftModel.from_pretrained(fresh(), tmp_path / "peft")
    assert_close(logits(opened, inputs), tuned, 64)
    with pytest.raises(ValueError, match=f"is a Linear{bits}bit.* whose weight cannot be added to: .*dequantize"):
        merge(model)
    assert torch.equal(logits(model, inputs), tuned), "and nothing has changed"
