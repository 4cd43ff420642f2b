"""Which experts come next: the contract of predictors, and one predictor a file."""
