"""Recipes: one CONFIG a file. `make train EXP=name` trains experiments/name.py; `make help` lists all commands."""
