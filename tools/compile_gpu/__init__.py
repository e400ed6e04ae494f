"""What compilers make of the Triton kernels, for GPUs that need not be there."""
