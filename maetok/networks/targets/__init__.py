"""Targets of masked prediction: HOG and features of frozen teachers."""
