"""What the evaluation card is made of: scores of texts, of generated answers and of classifiers, and speeds."""
