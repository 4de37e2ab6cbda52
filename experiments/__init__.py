"""One short file a recipe. `make train EXP=name` trains experiments/name.py; `make help` says more."""
