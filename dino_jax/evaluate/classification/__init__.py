"""k-NN, linear and logistic classifiers on frozen features."""
