"""Language models: texts and token ids → log p and gradients → Estimate; files of questions → files of scores."""
