"""The commands, one file each: options, parsing and printing. What they compute is in `training` and `evaluation`.

main            `vdm-jax`, which selects a command
common          what the commands share
train           train an experiment, or resume it; then evaluate and sample
sample          sample from the newest checkpoint
evaluate        evaluate the newest checkpoint on the test set
compare         train several recipes and compare them
import_weights  weights of a diffusers folder as a run, and back
"""
