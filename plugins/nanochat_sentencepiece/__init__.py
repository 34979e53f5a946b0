"""Subword pieces by sentencepiece: trained here, or a .model file."""
