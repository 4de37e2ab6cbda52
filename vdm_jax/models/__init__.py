"""Models: where equations and networks meet. Each is a frozen dataclass of options with `build(data) -> Experiment`."""
