"""From records to verdicts: statistics, published numbers, tables, figures, the page, wandb."""
