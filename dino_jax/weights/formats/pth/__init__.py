"""PyTorch's .pth files, read without PyTorch."""
