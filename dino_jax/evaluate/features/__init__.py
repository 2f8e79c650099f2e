"""Frozen features of images."""
