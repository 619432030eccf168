"""The operations the network is made of that plain PyTorch does not have."""
