"""Training: corpus, loader, optimizer, trainer, and what people see of it."""
