"""What a run needs from the machine: devices, processes, files, signals, errors, metrics."""
