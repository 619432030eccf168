"""Scores of images: how far generated images are from real ones, in the features of a network.

open_images, open_reference -> ImageSet -> FeatureNetwork -> features (n, d) -> metrics -> a table and JSON

evaluate.py     the command `lamamba evaluate`
image_sets.py   folders, .npz files and published statistics
features.py     the networks: Inception of 2015, the shipped one for clothes, any TorchScript file
metrics.py      functions of features
"""
