"""What is computed with a trained model; nothing here parses a command line.

dry_run            traces a run's computations before its first step
report             means and standard errors over the test set, report.json
likelihood_report  the rows of `Experiment.likelihood_rows` and their plot
features           feature extractors for sample quality: a classifier, Inception, or points themselves
scoring            a bound on -log P(x) of single examples, with its error
classification     classes by Bayes' rule from the bounds of a class-conditional model
sample_quality     distances between samples and test images in feature space
sampling           samples and the plots of a model
plots              PNG files of images, points and functions on the plane
comparison         several recipes in one table and one figure
baseline           the bits per dimension of pixel histograms
time_budget        whether a report would take longer than the training did
"""
