"""The tokenizer: encoder, bottleneck, decoder, mask modeling."""
