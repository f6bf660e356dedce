"""Datasets as records, records as splits, splits as tokens. Knows nothing of models but their tokenizer."""
