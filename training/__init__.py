"""Training in PyTorch: stages 1 to 3, LoRA, quantisation-aware fine-tuning, several processes."""
