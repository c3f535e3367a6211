"""Modules that several figure scripts share; none of them is a script."""
