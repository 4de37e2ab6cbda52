"""Data sets and batches: `sources` loads a data set by name or path, `batches` shuffles, augments and prefetches it.

spec          DataSpec, the description of a data set, and the options for reading it
sources       scikit-learn's digits, points in the plane; opens all other data
tfds_images   reading and preparing image sets of TensorFlow Datasets
user_files    what all of a user's own data share: paths, held-out test examples, fingerprints
arrays        a user's own array files
image_folder  a user's own folder of images
given_images  what a user gives to a trained model: an image, a folder of images, an array
planes        distributions in the plane with known density
series        Gaussian processes with known density
augmentation  flips, rotations and channel permutations
batches       reproducible shuffled batches with a checkpointable position
"""
