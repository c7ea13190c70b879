"""What all tests share: whose implementation is tested, where a failed test points, Hypothesis profiles, fixtures.

    SALORA_IMPL=folder python -m pytest        files in `folder` replace ours one by one; ours serve for those it lacks
"""

import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["hard_concrete", "salora", "budget", "tiny_transformer", "train_glue_mini"]

IMPL = os.environ.get("SALORA_IMPL") and Path(os.environ["SALORA_IMPL"]).resolve()
if IMPL:
    sys.path.insert(0, str(IMPL))
    os.environ["PYTHONPATH"], os.environ["PYTHONSAFEPATH"] = f"{IMPL}{os.pathsep}{ROOT}", "1"  # for child processes

COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
PHASES = [phase for phase in Phase if phase is not Phase.explain]  # which would point into torch
settings.register_profile("default", max_examples=50, phases=PHASES, **COMMON)
settings.register_profile("thorough", max_examples=1000, phases=PHASES, **COMMON)
BARE = [Phase.explicit, Phase.generate]
settings.register_profile("mutants", max_examples=50, phases=BARE, derandomize=True, **COMMON)
settings.load_profile("default")


def pytest_configure(config):
    if IMPL and not any((IMPL / f"{name}.py").is_file() for name in MODULES):
        lack = "holds none of " + ", ".join(f"{name}.py" for name in MODULES) if IMPL.is_dir() else "is not a folder"
        raise pytest.UsageError(f"SALORA_IMPL: {IMPL} {lack}")


def pytest_report_header():
    if IMPL:
        return [f"{name} from {importlib.util.find_spec(name).origin}" for name in MODULES]


EQUATIONS = [  # words in the name of a test, and the place where what it states is written; the first that fits counts
    ("adalora", "peers/adalora.py, Eqs. (4), (6) to (11): importance I_bar U_bar, and the b(t) best keep their value"),
    ("sora", "peers/sora.py, Eqs. (10), (11): g <- T(g - eta gradient), T the soft threshold at xi = eta lambda"),
    ("alora", "peers/alora.py, Eq. (6): IS(r) = S(M) - S(M without r) + S(M with only r); a move closes what it opens"),
    ("rm_lora", "peers/rm_lora.py, Eq. (10) and Alg. 1: r_hat of R directions are updated a step"),
    ("bottleneck|adapters_stand", "peers/adapters.py: x + W_up f(W_down x)"),
    ("prefix|prompt", "peers/prefix.py: trained keys and values, or words, in front of a sentence's own"),
    ("ia3|bitfit", "peers/bias.py: every bias; or l_k * k, l_v * v and l_ff * f(W_1 x)"),
    ("peer|installed|closed_form_says|frozen_model_does", "peers/: each file's first lines"),
    ("penalty|multiplier|ascent|controller", "budget.py, Eq. (12): loss + beta R_orth + lambda (C - b)^2, lambda >= 0, "
     "with descent on log theta and ascent on lambda"),
    ("phases|schedule|windows", "budget.py, Alg. 1: open before T_start, window before T_end, then frozen"),
    ("main_loop|of_a_step|once_a_step|micro_batch|moments|accumulat|recomput|two_processes",
     "train_glue_mini.py, fine_tune, Alg. 1: a step down for A, B and Theta, one up for lambda; one draw of noise a "
     "step; gates free from T_start on, fixed and pruned at T_end"),
    ("noise_(is|changes|that)", "budget.py, resample, Alg. 1: u ~ U(0, 1), drawn once a step for all layers"),
    ("projection", "budget.py, Eq. (11): one shift of every log theta, the one with which C = b"),
    ("odds|start_alike", "budget.py: log theta = spread log(|B[:, i]| |A[i, :]|) + a constant with which C = 11/12"),
    ("budget_rule|median_rule|unknown_rule|impossible_densit|survivors", "budget.py, section 3.5: from the largest log "
     "theta down each triplet that still fits b x total, ties to the earlier; or those with a positive median"),
    ("gradient_reaches", "hard_concrete.py, Eq. (7), and budget.py, Eq. (11): both have a gradient for log theta"),
    ("densit|counts|what_the_paper",
     "budget.py, Eq. (11): C = sum_i E||G_i||_0 (d_i + k_i) / sum_i r_i (d_i + k_i)"),
    ("orthogonality", "salora.py, Eq. (9): sum over layers of ||B^T B - I||^2_F + ||A A^T - I||^2_F"),
    ("canonical", "salora.py, canonicalize: B <- U S^1/2 and A <- S^1/2 V^T with U S V^T = B A"),
    ("saved_adapters|an_adapter_", "salora.py, adapter_state and load_adapter_state: what a file must hold"),
    ("prune|pruning|merg|removed|triplets_that_stay",
     "salora.py, Eq. (5): W <- W + (alpha / r0) B diag(g) A; triplets with g = 0 go"),
    ("adapt|target|rank_below|equal_starts|fresh_layer",
     "salora.py, Eq. (3): W stays as it is; A ~ N(0, 1/k) and B = 0 come in"),
    ("forward|lora|closed_gates|closed_is|triplets_and_gates|leading_axes|differences$",
     "salora.py, Eqs. (3) and (5): h = W x + (alpha / r0) B diag(g) A x"),
    ("module_samples",
     "hard_concrete.py, HardConcreteGate.forward: Eq. (7) with the noise u in train mode, the median in eval mode"),
    ("mean", "hard_concrete.py: E[g] = integral of P(g > t) over t in (0, 1)"),
    ("open_prob|is_open|likelier",
     "hard_concrete.py, Eq. (8): P(g > 0) = sigmoid(log theta - tau log(-gamma / zeta))"),
    ("probability_of_one", "hard_concrete.py: P(g = 1) = sigmoid(log theta - tau log((1 - gamma) / (zeta - 1)))"),
    ("median|without_noise", "hard_concrete.py, Eq. (7) at u = 1/2: the median gate, which evaluation uses"),
    ("sample|gate|everything_grows|constants|kinks",
     "hard_concrete.py, Eq. (7): g = clamp(sigmoid((logit(u) + log theta) / tau) (zeta - gamma) + gamma)"),
    ("encoder_equals|attention|positions|masked",
     "tiny_transformer.py: x = norm(x + f(x)), exact GELU, positions start at pad + 1"),
]  # fmt: skip


def equation_of(test):
    """The entry of EQUATIONS that fits a test's name, or None."""
    return next((place for words, place in EQUATIONS if re.search(words, test)), None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A failed test says in words what it states and where in the code and in the paper that is."""
    report = yield
    if report.when == "call" and report.failed:
        name = item.originalname.removeprefix("test_")
        lines = [name.replace("_", " "), inspect.getdoc(item.function), equation_of(name)]
        report.sections.append(("What this test states", "\n".join(filter(None, lines))))
    return report


@pytest.fixture(autouse=True)
def one_seed():
    """Hypothesis seeds random and NumPy, not torch: a test's own draws come from this seed."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A checkpoint folder with a random encoder, large enough for the words of the generated tasks."""
    from tiny_transformer import TinyTransformer, TransformerConfig, save_pretrained

    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=130,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
        type_vocab_size=2,
        hidden_dropout_prob=0.1,
        initializer_range=0.2,
    )
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
