"""One Hypothesis profile for all tests, and the fixtures that several files share."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tiny_transformer import TinyTransformer, TransformerConfig, save_pretrained

COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("default", max_examples=50, **COMMON)
settings.register_profile("thorough", max_examples=1000, **COMMON)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def one_seed():
    """Hypothesis seeds random and NumPy, not torch: a test's own draws come from this seed."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A checkpoint folder with a random encoder, large enough for the words of the generated tasks."""
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
