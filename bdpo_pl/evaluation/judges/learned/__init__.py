"""A small learned judge of refusals: logistic regression on hashed n-grams, its data, training and measurement."""
