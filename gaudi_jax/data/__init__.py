"""Data: image sources, augmentation and Grain pipelines."""
