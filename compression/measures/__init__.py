"""What the evaluation card is made of: scores of texts, and of generated answers, and speeds."""
