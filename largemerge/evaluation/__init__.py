"""Measuring models: what a merge keeps of its experts' abilities."""
