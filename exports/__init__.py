"""A backbone in, an artifact out."""
