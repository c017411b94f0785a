"""A small learned judge of refusals: logistic regression on hashed n-grams, with its data, training and evaluation."""
