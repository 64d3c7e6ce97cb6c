"""A small reasoning model: its generated task, training script, evaluation and weights."""
