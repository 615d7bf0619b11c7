"""An encoder run block by block, on blocks that are small beside what is encoded."""

import torch

from peft_sae.sae import encoding


def small_blocks(monkeypatch):
    """Allow blocks of any size."""
    monkeypatch.setattr(encoding, "_LEAST_ROWS", 1)
    monkeypatch.setattr(encoding, "_LEAST_FEATURES", 1)


def from_blocks(handle, activations, elements):
    """All activations [tokens, d_sae], each seen once."""
    found = torch.full((len(activations), handle.identity.d_sae), torch.nan, dtype=handle.sae.dtype)
    for tokens, features, block in handle.encode_blocks(activations, elements):
        assert found[tokens, features].isnan().all()
        assert block.numel() <= max(elements, found.shape[1]) or tokens.stop - tokens.start == 1
        found[tokens, features] = block
    return found
