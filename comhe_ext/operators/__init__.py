"""The operators of torch.ops.comhe_ext, and the autograd Functions around them."""
