"""Views in, a backbone out: self-distillation."""
