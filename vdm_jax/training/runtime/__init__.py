"""The machine under a run: nothing here knows about data, models or training.

devices         meshes and shardings
processes       initialization of several processes and their coordination
files           atomic writes and locks of run folders
signals         graceful stop on SIGINT, SIGTERM and SIGHUP
errors          user errors as one message without a traceback
environment     environment variables, logging, the compilation cache
accelerator     detection of an accelerator that JAX does not use
invocation      how the user calls the commands, for messages
metric_buffer   metrics of recent steps, kept on the devices
metrics_writer  metrics.jsonl, TensorBoard and the terminal
speed           training time and steps per second
"""
