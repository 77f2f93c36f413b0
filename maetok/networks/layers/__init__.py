"""Layers that networks share: attention, rotary embedding, transformer blocks, patches; and what a network offers."""
