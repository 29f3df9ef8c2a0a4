"""From images alone to triplets: deduplicate, caption, match pairs, write the modification text."""
