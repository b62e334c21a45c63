"""Curation: features of a heap of images in, a list of images worth training on out."""
