"""The forward pass: checkpoints, paged KV tensors, attention, sampling. Imports torch, never Django."""
