"""From records to token ids, by each model's own tokenizer and chat template."""
