"""Does it help? Networks trained on CIFAR-100 with and without the regularizers."""
