"""The generation engine: rows of language models, stepped over a paged KV cache."""
