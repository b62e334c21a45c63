"""Views in, features out: ViT and ResNet, their checkpoints, heads and published weights."""
