"""A small mixture-of-experts model to try compression on: its corpus, tokenizer, training and export."""
