"""Modules that the scripts share: each named by one noun, with imports going one way."""
