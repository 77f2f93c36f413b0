"""Commands that drive runs of ``main.py`` or read what they left."""
