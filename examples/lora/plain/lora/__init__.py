"""A frozen transformer with LoRA adapters, which alone are trained and sent."""
