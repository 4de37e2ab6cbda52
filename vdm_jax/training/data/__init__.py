"""Data sets and batches: `sources` loads a data set by name, `batches` shuffles, augments and prefetches it.

spec          DataSpec, the description of a data set
sources       scikit-learn's digits, image sets of TensorFlow Datasets, points in the plane
tfds_images   reading and preparing image sets of TensorFlow Datasets
planes        distributions in the plane with known density
augmentation  flips, rotations and channel permutations
batches       reproducible shuffled batches with a checkpointable position
"""
