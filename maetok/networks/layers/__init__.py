"""Layers that networks share: attention, rotary embedding, transformer blocks, patches."""
