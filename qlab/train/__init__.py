"""The embedded model qlab-mini: its corpus, pretraining, question task, fine-tuning and evaluation."""
