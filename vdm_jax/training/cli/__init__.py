"""The commands, one file each: options, parsing and printing. What they compute is in `training` and `evaluation`.

main            `vdm-jax`, which selects a command
common          what the commands share
train           train a recipe, or resume its run; then evaluate and sample
sample          sample from the latest checkpoint of a run
evaluate        evaluate the latest checkpoint of a run on the test set
score           the likelihood of each given image, or its class by Bayes' rule
interpolate     images between pairs of given images, through the latents of the ODE
restore         inpainting and super-resolution of given images
given           what the commands on given images share
compare         train several recipes and compare them
import_weights  weights of a diffusers folder as a run, and back
"""
