"""What all tests share: whose implementation is tested, where a failed test points, Hypothesis profiles, fixtures.

    SALORA_IMPL=folder python -m pytest        files in `folder` replace ours one by one; ours serve for those it lacks
    python -m pytest --exercise 3              the checks of one exercise of the course: see course/lesson.py
"""

import importlib.util
import inspect
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["hard_concrete", "salora", "budget", "guard", "rank_allocator", "tiny_transformer", "train_glue_mini"]

IMPL = os.environ.get("SALORA_IMPL") and Path(os.environ["SALORA_IMPL"]).resolve()
if IMPL:
    sys.path.insert(0, str(IMPL))
    os.environ["PYTHONPATH"], os.environ["PYTHONSAFEPATH"] = f"{IMPL}{os.pathsep}{ROOT}", "1"  # for child processes

COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
PHASES = [phase for phase in Phase if phase is not Phase.explain]  # which would point into torch
settings.register_profile("default", max_examples=25, phases=PHASES, **COMMON)
settings.register_profile("thorough", max_examples=1000, phases=PHASES, **COMMON)
BARE = [Phase.explicit, Phase.generate]
settings.register_profile("mutants", max_examples=50, phases=BARE, derandomize=True, **COMMON)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--exercise", metavar="N", help="run the checks of exercise N of course/exercises.md alone")


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job's programs would ignore the tests' Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--exercise"):
        from course import lesson

        return lesson.begin(config, config.getoption("--exercise"), IMPL)
    if IMPL and not any((IMPL / f"{name}.py").is_file() for name in MODULES):
        lack = "holds none of " + ", ".join(f"{name}.py" for name in MODULES) if IMPL.is_dir() else "is not a folder"
        raise pytest.UsageError(f"SALORA_IMPL: {IMPL} {lack}")


def pytest_report_header():
    if IMPL:
        return [f"{name} from {importlib.util.find_spec(name).origin}" for name in MODULES]


EQUATIONS = {  # what stands in @pytest.mark.equation("8") -> the place in the code and in the paper, and what it says
    # The gate
    "7": "hard_concrete.py, Eq. (7): g = clamp(sigmoid((logit(u) + log theta) / tau) (zeta - gamma) + gamma)",
    "8": "hard_concrete.py, Eq. (8): P(g > 0) = sigmoid(log theta - tau log(-gamma / zeta))",
    "P(g = 1)": "hard_concrete.py, prob_one: P(g = 1) = sigmoid(log theta - tau log((1 - gamma) / (zeta - 1)))",
    "median": "hard_concrete.py, median_gate: Eq. (7) at u = 1/2, which is what evaluation uses",
    "E[g]": "hard_concrete.py, mean_gate: E[g] = integral of P(g > t) over t in (0, 1)",
    "gate": "hard_concrete.py, HardConcreteGate: held at 1; then free (train: Eq. (7), eval: the median); then fixed",
    # The layer
    "3": "salora.py, Eq. (3): h = W x + (alpha / r0) B A x with W frozen; A starts as N(0, 1/k) and B as 0",
    "5": "salora.py, Eq. (5): h = W x + (alpha / r0) B diag(g) A x",
    "9": "salora.py, Eq. (9): sum over layers of ||B^T B - I||^2_F + ||A A^T - I||^2_F",
    "canonical": "salora.py, canonicalize: B <- U S^1/2 and A <- S^1/2 V^T with U S V^T = B A",
    "prune": "salora.py, prune: triplets whose settled gate is 0 go, and no output changes",
    "merge": "salora.py, merge: W <- W + (alpha / r0) B diag(g) A with settled gates",
    "adapter file": "hub/adapters.py, adapter_state and load_adapter_state: all but W, and it comes back exactly",
    # The budget
    "11": "budget.py, Eq. (11): C = sum_i E||G_i||_0 (d_i + k_i) / sum_i r_i (d_i + k_i)",
    "12": "budget.py, Eq. (12): loss + beta R_orth + lambda (C - b)^2, down for A, B and log theta, up for lambda >= 0",
    "projection": "budget.py, project: one shift of every log theta, the one with which Eq. (11) gives C = b",
    "first odds": "budget.py, start_gates: log theta = spread log(scale |B[:, i]| |A[i]| / sqrt(d + k)) + c, C = 11/12",
    "budget rule": "budget.py, freeze_gates: from the largest log theta down, each triplet that still fits b x total",
    "median rule": "budget.py, freeze_gates, section 3.5: the triplets whose median gate is positive",
    # Algorithm 1
    "noise": "budget.py, resample, Alg. 1: u ~ U(0, 1), one draw an optimizer step for all layers",
    "phases": "budget.py, GateSchedule, Alg. 1: gates are held before T_start, free before T_end, then fixed",
    "learning rate": "rank_allocator.py, lr_factor: a rise, then a line down to 0; with a restart, again from T_end on",
    "alg 1": "rank_allocator.py, RankAllocator, Alg. 1: gates held until T_start; in the window one draw of noise per "
    "step, log theta down and lambda up, beside A and B; at T_end gates are fixed and closed triplets go",
    # The encoder
    "encoder": "tiny_transformer.py: x = norm(x + f(x)) with exact GELU; positions start at pad + 1",
    # The peers
    "adalora": "peers/adalora.py, Eqs. (6) to (11): importance I_bar U_bar; the b(t) best keep their value",
    "sora": "peers/sora.py, Eqs. (10), (11): g <- T(g - eta gradient), T the soft threshold, and 0 below 2 xi",
    "alora": "peers/alora.py, Eq. (6): IS(r) = S(M) - S(M without r) + S(M with only r); a move opens what it closes",
    "rm-lora": "peers/rm_lora.py, Eq. (10) and Alg. 1: a step updates r_hat of R directions",
    "peers": "peers/allocator.py: the hooks of a training loop, and plain LoRA when it is over",
    "adapters": "peers/adapters.py: x + W_up f(W_down x + b_down) + b_up",
    "prefix": "peers/prefix.py: trained keys and values, or words, beside a sentence's own",
    "bias": "peers/bias.py: every bias; or l_k * k, l_v * v and l_ff * f(W_1 x)",
    "child-tuning": "peers/child_tuning.py: W <- W - M * eta dL/dW, M the share p with the largest sum of (dL/dw)^2",
    "mam": "peers/mam.py: FFN(x) + s (W_up relu(W_down x + b_down) + b_up), and a prefix in the attention",
    "propelt": "peers/propelt.py: theta_i = theta * m_i, m_i the share k with the largest |s_i|",
    "nf4": "peers/nf4.py: W ~ c levels[codes], levels quantiles of the normal distribution, c = max |W| of 64 entries",
}  # fmt: skip


def equations_of(item):
    """The entries of EQUATIONS that a test's own marker names; else those of its class's or its module's."""
    marker = item.get_closest_marker("equation")
    return [EQUATIONS[key] for key in marker.args] if marker else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A failed test says in words what it states, and where in the code and in the paper that is."""
    report = yield
    if report.when == "call" and report.failed:
        words = item.originalname.removeprefix("test_").replace("_", " ")
        lines = [words, inspect.getdoc(item.function), *equations_of(item)]
        report.sections.append(("What this test states", "\n".join(filter(None, lines))))
    return report


@pytest.fixture(autouse=True)
def one_seed():
    """Hypothesis seeds random and NumPy, not torch: a test's own draws come from this seed."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A checkpoint folder with a random encoder, large enough for the words of the generated tasks."""
    from hub.roberta import save_pretrained
    from tiny_transformer import TinyTransformer, TransformerConfig

    torch.manual_seed(0)
    sizes = dict(vocab_size=130, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = TransformerConfig(**sizes, max_position_embeddings=48, type_vocab_size=2, initializer_range=0.2)
    folder = tmp_path_factory.mktemp("weights")
    save_pretrained(TinyTransformer(config), folder)
    return folder


def folder_from(variable):
    """A fixture: the folder that an environment variable names, or a visible skip."""

    @pytest.fixture(scope="session")
    def folder():
        if not os.environ.get(variable):
            pytest.skip(f"set {variable} to run this")
        return Path(os.environ[variable])

    return folder


glue_dir = folder_from("GLUE_DIR")
encoder_dir = folder_from("ENCODER_DIR")
roberta_tokenizer_dir = folder_from("ROBERTA_TOKENIZER_DIR")


@pytest.fixture
def tiny_lm(tmp_path, tiny_weights, monkeypatch):
    """The shift study with a small random masked LM instead of the pre-trained one. Returns flags for a short run."""
    from experiments import shift
    from hub.roberta import load_pretrained, save_pretrained
    from tiny_transformer import MaskedLM

    save_pretrained(MaskedLM(load_pretrained(tiny_weights)[0]), tmp_path / "lm")
    monkeypatch.setattr(shift, "mini_encoder", lambda: tmp_path / "lm")
    monkeypatch.setattr(shift, "HELD_OUT", 40)
    shift.data_of.cache_clear()
    yield ["--steps", "10", "--texts", "64", "--out", str(tmp_path / "out")]
    shift.data_of.cache_clear()


DECODER_WORDS = "the a film song was is not very good bad great dull and but . old new dog cat saw".split()


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory):
    """A folder as transformers saves it: a random decoder of the LLaMA family, whose tokens are DECODER_WORDS."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("decoder")
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *DECODER_WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    shape = dict(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, **heads, initializer_range=0.3, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def go(tiny_weights, tmp_path, monkeypatch):
    """Run the main job on the tiny random encoder, in an empty folder: go("--flag", value ...) -> summary."""
    from main_job import main_job

    monkeypatch.chdir(tmp_path)
    return partial(main_job, weights=tiny_weights)
