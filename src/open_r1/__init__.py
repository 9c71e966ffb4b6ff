"""Supervised fine-tuning around TRL's SFTTrainer: recipes, data, chat templates, resume."""
