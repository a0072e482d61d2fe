"""Settings of runs that take a second."""

from dataclasses import replace

from kvist.train.settings import Method, TrainSettings, Vocabulary

SMALL = TrainSettings(
    family="qwen3",
    layers=2,
    heads=4,
    kv_heads=2,
    hidden_size=32,
    intermediate_size=48,
    context=32,
    rows=4,
    steps=12,
    learning_rate=5e-3,
    warmup_share=0.2,
    method=Method.MUON,
    dropout=0.1,
    short_context=16,
    short_share=0.5,
    evaluate_every=5,
    save_every=4,
)
GPT2 = replace(SMALL, family="gpt2", kv_heads=4, method=Method.ADAMW, dropout=0.0, short_context=0, short_share=0.0)
LLAMA = replace(SMALL, family="llama", kv_heads=1)
BYTES = replace(SMALL, vocabulary=Vocabulary.BYTES, vocab_size=280)
