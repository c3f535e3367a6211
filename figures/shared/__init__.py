"""What several figure scripts share; no module here is a script."""
