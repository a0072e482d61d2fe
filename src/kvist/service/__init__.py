"""Text in, text out: a model with its tokenizer and engine, and the streams that come from it."""
