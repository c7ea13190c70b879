"""Other people's files: checkpoint folders, PEFT adapters, tokenizers."""
