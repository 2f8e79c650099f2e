"""Weights from files and folders."""
