"""A decoder of the LLaMA family from a folder that transformers has saved, asked for its next words."""

from pathlib import Path

import torch
from torch import nn

from hub.tokenizers import errors_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # the linear maps of a layer


class NextWord(nn.Module):
    """Token ids and a mask of positions, each (batch, seq) -> logits of the word after each position (n, vocab)."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids, positions):
        hidden = self.lm.model(ids, use_cache=False).last_hidden_state  # (batch, seq, width)
        return self.lm.lm_head(hidden[positions])


def load_decoder(folder, device="cpu"):
    """(a NextWord in fp32, its tokenizer). Raises OSError or ValueError for a folder without them."""
    folder = Path(folder)
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}; expected a decoder and its tokenizer as transformers "
                                    "saves them")  # fmt: skip
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    except ImportError:
        raise ValueError("a real decoder needs transformers: pip install -r requirements-dev.txt") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with errors_of(folder, "cannot be loaded"):
        lm, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True,
                                                        output_loading_info=True)  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if info["missing_keys"]:  # they would be random
        raise ValueError(f"{folder} lacks weights of the model in config.json: {min(info['missing_keys'])}")
    names = {name.rpartition(".")[2] for name, _ in lm.named_modules()}
    if not names.issuperset(TARGETS) or not hasattr(lm, "model"):
        raise ValueError(f"{folder} holds a {type(lm).__name__}; expected the LLaMA family, with {', '.join(TARGETS)}")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no eos_token to end a text with")
    return NextWord(lm).to(device).eval(), tokenizer
