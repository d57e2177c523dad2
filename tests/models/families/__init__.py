"""Tests that run once per model family."""
