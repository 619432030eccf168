"""Scores of images: how far generated images are from real ones, in the features of a network.

open_images, open_reference -> ImageSet -> FeatureNetwork -> features (n, d) -> metrics -> a table and JSON
"""
